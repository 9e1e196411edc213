"""The registry of export formats.

A new format needs one converter module and one row in `FORMATS`. The command line, its help, the documentation and the
tests all read the rows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, get_args

import msgspec

from cifarx_serve.backends.registry import backend_suffixes
from cifarx_serve.errors import UsageError, unknown_name_error
from cifarx_serve.progress import Progress
from cifarx_serve.spec import ModelSpec, Precision

if TYPE_CHECKING:  # `cifarx export --help` reads this module and must not import PyTorch
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto
    from torch import Tensor, nn

    from cifarx_export.parity.checks import Check

T = TypeVar("T")

PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)

OPSETS: Final = range(11, 24)
"""Supported ONNX opsets. PyTorch's exporter writes 18 and newer; its model is converted to older ones. 23 is the newest
tested with ONNX Runtime."""

_TEST_BATCH_SIZE: Final = 64

_ONNX_WEIGHT_LIMIT: Final = 2**31 - 2**24
"""Bytes of weights that fit into one ONNX file: protobuf's limit of 2 GiB, with 16 MiB for the graph and the spec."""

_FLATBUFFER_WEIGHT_LIMIT: Final = 2**31 - 2**24
"""Bytes of weights that fit into one LiteRT file: the limit of FlatBuffers, with room for the graph."""

MIN_INT8_OPSET: Final = 13
"""The lowest opset in which weights can have one scale per channel."""

MIN_BF16_OPSET: Final = 13
"""The lowest opset with casts to bfloat16, in which bf16 is simulated."""

MIN_EMBEDDING_OPSET: Final = 18
"""The lowest opset with the operators of the embedded preprocessing."""


class ExportOptions(NamedTuple):
    """User options of a conversion. None means the default of the format.

    A format raises `UsageError` for an option that it does not support.

    Attributes:
        opset: opset of the ONNX file, one of `OPSETS`.
        calibration_images: number of training images to calibrate int8 activations on.
        embed_preprocessing: include resizing, scaling and normalization in the model, so that its input is uint8
            images of any size.
    """

    opset: int | None = None
    calibration_images: int | None = None
    embed_preprocessing: bool | None = None


NO_OPTIONS: Final = ExportOptions()


@dataclass(frozen=True, eq=False)
class ConversionSource:
    """The input of a converter. All formats that one export writes in one precision share it.

    Attributes:
        build_module: returns a new copy of the network, in eval mode, fp32, on the CPU. A converter may modify it. That
            of an ONNX file is made from its operators.
        spec: spec of the model, with the precision to convert to.
        options: options of the user.
        load_training_images: returns the requested number of images, spread evenly over the training split: uint8,
            (N, height, width, channels).
        progress: called with a line of text at each step.
        load_onnx: returns a new copy of the model if the network is an ONNX file.
        test_images: images of the test split at the network's input size: uint8, (N, height, width, channels). None if
            there are none.
        original: returns the network that the artifacts are checked against, in eval mode, if `build_module` returns
            one with other weights.
    """

    build_module: "Callable[[], nn.Module]"
    spec: ModelSpec
    options: ExportOptions
    load_training_images: "Callable[[int], NDArray[np.uint8]]"
    progress: Progress
    load_onnx: "Callable[[], ModelProto] | None" = None
    test_images: "NDArray[np.uint8] | None" = None
    original: "Callable[[], nn.Module] | None" = None
    _shared: "dict[Callable[[ConversionSource], Any], Any]" = field(default_factory=dict, init=False, repr=False)

    def example_input(self) -> "Tensor":
        """Return a batch to trace the network with: two random images, because exporters specialize on a batch of one.

        Float32, (2, *input.shape), the same at every call.
        """
        return example_input(self.spec)

    def test_inputs(self, count: int) -> "Iterator[NDArray[np.float32]]":
        """Yield a black and a white image, and up to `count` images spread evenly over the test images.

        They are as the network takes them: batches of at most 64, float32 (N, *input.shape).
        """
        import numpy as np

        from cifarx_serve.images.preprocess import normalize  # the help needs neither of them

        size = self.spec.input
        shape = (1, size.height, size.width, size.channels)
        yield normalize(np.concatenate([np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)]), size)
        if self.test_images is not None:
            images = self.test_images[:: math.ceil(len(self.test_images) / count) or 1]
            for start in range(0, len(images), _TEST_BATCH_SIZE):
                yield normalize(images[start : start + _TEST_BATCH_SIZE], size)

    def compute_once(self, function: "Callable[[ConversionSource], T]") -> T:
        """Return `function(self)`. The first call computes it; the formats that share this source reuse the result."""
        if function not in self._shared:
            self._shared[function] = function(self)
        result: T = self._shared[function]
        return result


def example_input(spec: ModelSpec) -> "Tensor":
    """Return two random images as a network takes them: float32, (2, *input.shape), the same at every call."""
    import torch  # imported here because the command line's help must not import PyTorch

    return torch.rand(2, *spec.input.shape, generator=torch.Generator().manual_seed(0))


class Artifact(ABC):
    """A converted model that can be written to a file.

    Attributes:
        facts: facts about the conversion that the spec records, such as the opset.
        checks: what the conversion itself found about the model, in addition to the parity check.
    """

    facts: Mapping[str, str] = MappingProxyType({})
    checks: "Sequence[Check]" = ()

    def complete_spec(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` with what only the conversion knows: its facts, and what a subclass adds."""
        if not self.facts:
            return spec
        return msgspec.structs.replace(spec, exporter={**(spec.exporter or {}), **self.facts})

    @abstractmethod
    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the model to `path` with the spec embedded. Saving it again with another spec changes only the spec."""


Converter = Callable[[ConversionSource], Iterable[Artifact]]
"""Converts a network to one or more candidates. A candidate is tried only if the one before fails its parity check."""


class Format(NamedTuple):
    """A row of `FORMATS`.

    Attributes:
        backend: name of the backend that runs the artifact.
        precisions: supported precisions.
        devices: devices that the artifact runs on.
        options: names of the supported `ExportOptions`.
        converter: `module:function` of the `Converter`, imported on first use.
        is_made_from_onnx: whether it is made from the ONNX model, and an ONNX file becomes it as it is.
        legacy: whether the authors of the format have deprecated it.
        directory_suffix: suffix of an artifact that is a directory. None for an artifact that is a file, which has the
            suffix of its backend.
        max_weight_bytes: limit for the weights of the network in fp32, at any precision, because every conversion
            starts from fp32. None for no limit.
    """

    backend: str
    precisions: tuple[Precision, ...]
    devices: tuple[str, ...]
    options: tuple[str, ...]
    converter: str
    is_made_from_onnx: bool = False
    legacy: bool = False
    directory_suffix: str | None = None
    max_weight_bytes: int | None = None

    @property
    def suffix(self) -> str:
        """The suffix of an artifact, such as `.onnx`."""
        return self.directory_suffix or backend_suffixes(self.backend)[0]

    def convert(self, source: ConversionSource) -> Iterable[Artifact]:
        """Convert a network to one or more candidates. See `Converter`."""
        module, _, function = self.converter.partition(":")
        converter: Converter = getattr(import_module(module), function)
        return converter(source)

    def file_name(self, stem: str, precision: Precision, embedded: bool = False) -> str:
        """Return the name of an artifact: `lzh_9.onnx`, `lzh_9.int8.onnx`, `lzh_9.embedded.fp16.onnx`."""
        parts = [stem, *(["embedded"] if embedded else []), *([precision] if precision != "fp32" else [])]
        return ".".join(parts) + self.suffix


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "onnx": Format(
            backend="onnxruntime",
            precisions=("fp32", "fp16", "int8"),
            devices=("cpu", "cuda", "tensorrt"),
            options=("opset", "calibration_images", "embed_preprocessing"),
            converter="cifarx_export.formats.onnx.converter:convert_to_onnx",
            is_made_from_onnx=True,
            max_weight_bytes=_ONNX_WEIGHT_LIMIT,
        ),
        "torchscript": Format(
            backend="torchscript",
            precisions=("fp32", "fp16"),
            devices=("cpu", "cuda", "mps"),
            options=(),
            converter="cifarx_export.formats.torchscript:convert_to_torchscript",
            legacy=True,
        ),
        "pt2": Format(
            backend="exported_program",
            precisions=("fp32", "fp16"),
            devices=("cpu", "cuda"),
            options=(),
            converter="cifarx_export.formats.exported_program:convert_to_exported_program",
        ),
        "aotinductor": Format(
            backend="aot_inductor",
            precisions=("fp32", "int8"),
            devices=("cpu",),
            options=("calibration_images",),
            converter="cifarx_export.formats.aot_inductor.converter:convert_to_aot_inductor",
        ),
        "openvino": Format(
            backend="openvino",
            precisions=("fp32", "bf16", "int8"),
            devices=("cpu", "gpu", "npu"),
            options=("opset", "calibration_images"),
            converter="cifarx_export.formats.openvino:convert_to_openvino",
            is_made_from_onnx=True,
            max_weight_bytes=_ONNX_WEIGHT_LIMIT,
        ),
        "executorch": Format(
            backend="executorch",
            precisions=("fp32", "int8"),
            devices=("cpu",),
            options=("calibration_images",),
            converter="cifarx_export.formats.executorch.converter:convert_to_executorch",
        ),
        "litert": Format(
            backend="litert",
            precisions=("fp32", "int8"),
            devices=("cpu",),
            options=("calibration_images",),
            converter="cifarx_export.formats.litert.converter:convert_to_litert",
            max_weight_bytes=_FLATBUFFER_WEIGHT_LIMIT,
        ),
        "triton": Format(
            backend="onnxruntime",
            precisions=("fp32", "fp16", "int8"),
            devices=("cpu", "cuda"),
            options=("opset", "calibration_images", "embed_preprocessing"),
            converter="cifarx_export.formats.triton.converter:convert_to_triton",
            is_made_from_onnx=True,
            directory_suffix=".triton",
            max_weight_bytes=_ONNX_WEIGHT_LIMIT,
        ),
        "web": Format(
            backend="web",
            precisions=("fp32", "fp16", "int8"),
            devices=("cpu",),
            options=("calibration_images",),
            converter="cifarx_export.formats.web.converter:convert_to_web",
            is_made_from_onnx=True,
            directory_suffix=".web",
            max_weight_bytes=_ONNX_WEIGHT_LIMIT,
        ),
    }
)


def get_format(name: str) -> Format:
    """Return the format called `name`.

    Raises:
        UsageError: there is no such format.
    """
    if name not in FORMATS:
        raise unknown_name_error("format", name, FORMATS)
    return FORMATS[name]


def require_supported(name: str, precision: str, options: ExportOptions) -> None:
    """Check that a format supports a precision and all given options.

    Raises:
        UsageError: there is no such format or precision, or the format does not support it or one of the options.
    """
    row = get_format(name)
    if precision not in PRECISIONS:
        raise unknown_name_error("precision", precision, PRECISIONS)
    if precision not in row.precisions:
        others = [other for other, candidate in FORMATS.items() if precision in candidate.precisions]
        raise UsageError(
            f"format {name} does not support {precision}",
            f"it supports {', '.join(row.precisions)}; {' and '.join(others)} support {precision}",
        )
    for option, value in options._asdict().items():
        if value is not None and option not in row.options:
            flag = f"--{option.replace('_', '-')}"
            others = [other for other, candidate in FORMATS.items() if option in candidate.options]
            raise UsageError(
                f"format {name} does not support {flag}", f"leave it out, or export only {' or '.join(others)}"
            )
    if options.calibration_images is not None and precision != "int8":
        raise UsageError(f"{precision} needs no calibration", "leave --calibration-images out, or add --precision int8")
    if options.opset is not None:
        _require_opset(options.opset, precision, options)


def require_weights_fit(name: str, weight_bytes: int) -> None:
    """Check that a format can hold the weights of a network, before any work is done.

    Args:
        name: name of the format.
        weight_bytes: size of the weights in fp32.

    Raises:
        UsageError: they are too large.
    """
    limit = get_format(name).max_weight_bytes
    if limit is not None and weight_bytes > limit:
        others = [other for other, row in FORMATS.items() if row.max_weight_bytes is None]
        raise UsageError(
            f"the weights have {weight_bytes / 1e9:.2f} GB, and {name} files hold at most {limit / 1e9:.2f} GB",
            f"use --format {' or '.join(others)}",
        )


def _require_opset(opset: int, precision: str, options: ExportOptions) -> None:
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", f"give {OPSETS[0]} to {OPSETS[-1]}")
    for given, feature, needed in (
        (precision == "int8", "int8", MIN_INT8_OPSET),
        (precision == "bf16", "bf16", MIN_BF16_OPSET),
        (options.embed_preprocessing, "--embed-preprocessing", MIN_EMBEDDING_OPSET),
    ):
        if given and opset < needed:
            raise UsageError(f"{feature} needs opset {needed}, not {opset}", f"give --opset {needed} to {OPSETS[-1]}")
