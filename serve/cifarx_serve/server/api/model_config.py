"""The configuration of a model, as the model configuration extension of Triton's protocol reports it.

Source: extension_model_configuration.md of triton-inference-server/server, and model_config.proto of its `common`.
"""

from typing import Final

import msgspec

from cifarx_serve.server.api.open_inference import input_metadata
from cifarx_serve.server.inference.model import ServedModel
from cifarx_serve.server.settings import Limits

_CUDA: Final = ("cuda", "tensorrt")


class ConfigTensor(msgspec.Struct, frozen=True):
    """The input or output of a model, without the dimension of the batch. A dimension of -1 can have any size."""

    name: str
    data_type: str
    dims: tuple[int, ...]


class ConfigParameter(msgspec.Struct, frozen=True):
    """The value of a parameter."""

    string_value: str


class DynamicBatching(msgspec.Struct, frozen=True):
    """How requests are batched."""

    preferred_batch_size: tuple[int, ...]
    max_queue_delay_microseconds: int


class InstanceGroup(msgspec.Struct, frozen=True):
    """The copies of a model in one worker."""

    name: str
    kind: str
    count: int = 1


class ModelConfig(msgspec.Struct, frozen=True):
    """The configuration of a model.

    `max_batch_size` is the maximum number of images per request. The parameter `class_names` is a JSON array, in the
    order of the output.
    """

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: tuple[ConfigTensor, ...]
    output: tuple[ConfigTensor, ...]
    instance_group: tuple[InstanceGroup, ...]
    dynamic_batching: DynamicBatching
    parameters: dict[str, ConfigParameter]


def model_config(model: ServedModel, limits: Limits) -> ModelConfig:
    """Return the configuration of a model.

    Args:
        model: the model.
        limits: the limits of the server.
    """
    spec, info = model.spec, model.info()
    tensor = input_metadata(spec)
    kind = "KIND_GPU" if any(name in info.provider.lower() for name in _CUDA) else "KIND_CPU"
    class_names = msgspec.json.encode(spec.class_names).decode()
    return ModelConfig(
        model.name,
        model.platform,
        info.backend,
        limits.max_images,
        (ConfigTensor(tensor.name, f"TYPE_{tensor.datatype}", tensor.shape[1:]),),
        (ConfigTensor(spec.output, "TYPE_FP32", (spec.output_size,)),),
        (InstanceGroup(model.name, kind),),
        DynamicBatching((limits.max_batch,), limits.max_delay_us),
        {"class_names": ConfigParameter(class_names)},
    )
