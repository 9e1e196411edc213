"""Saving and loading checkpoints. Files are written atomically and loaded without running any code in them."""

import copy
import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import torch
from torch import nn

from cifarx_serve.backends.base import require_file
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.legacy.reader import read_legacy_checkpoint
from cifarx_train.checkpoints.legacy.safe_unpickle import as_plain_dict, safe_load
from cifarx_train.models.options import NO_OPTIONS, ModelOptions
from cifarx_train.models.registry import get_architecture
from cifarx_train.recipes import rename_old_fields

StateDict: TypeAlias = dict[str, Any]

SUFFIX = ".pth"


class Checkpoint(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        spec: what the model is and how it was trained.
        weights: the state dict of the model, on the CPU.
        training: the training state, from which a run resumes bit for bit: optimizer, random generators, step.
    """

    spec: ModelSpec
    weights: StateDict
    training: StateDict

    def build(self) -> nn.Module:
        """Build the model and load its weights, on the CPU and in eval mode.

        Raises:
            UsageError: this version does not know the model.
            ModelFileError: the weights do not match the model that the spec names.
        """
        architecture = get_architecture(self.spec.model, stem=self.spec.stem)
        module = architecture.build(len(self.spec.class_names), self.spec.input)
        try:
            module.load_state_dict(self.weights)
        except (RuntimeError, AttributeError) as error:  # AttributeError for keys that are not strings
            reason = " ".join(str(error).split())
            raise ModelFileError(
                f"the weights do not match the model {self.spec.model} ({reason})", "train the model again"
            ) from error
        return module.eval()


def checkpoint_path(directory: Path, model: str, epoch: int) -> Path:
    """Return the path `{model}_{epoch}.pth`. Epochs count from 0."""
    return directory / f"{model}_{epoch}{SUFFIX}"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as a dict of tensors and plain types, readable with `torch.load(weights_only=True)`.

    The tensors are copied to the CPU, so that machines without the training device can load the file.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {"spec": checkpoint.spec.to_json(), "model": checkpoint.weights, "training": checkpoint.training}
    buffer = io.BytesIO()  # when the disk is full, PyTorch's own file writer raises an error without the reason
    torch.save(_copy_to_cpu(content), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        write_checksum(temporary)


def _copy_to_cpu(value: Any) -> Any:
    """Copy the tensors in nested dicts and lists to the CPU. Tensors that are there already are not copied."""
    match value:
        case torch.Tensor():
            return value.cpu()
        case dict():
            copied = copy.copy(value)  # a state dict has attributes
            copied.update({key: _copy_to_cpu(item) for key, item in value.items()})
            return copied
        case list():
            return [_copy_to_cpu(item) for item in value]
        case _:
            return value


def load_checkpoint(path: Path, options: ModelOptions = NO_OPTIONS) -> Checkpoint:
    """Load a checkpoint, or a legacy `.pth` file of the training notes, onto the CPU.

    Args:
        path: the file.
        options: what the user states about the model.

    Raises:
        ModelFileError: the file is missing or damaged, or does not contain the weights of a known model.
        SpecError: the spec in the file is malformed or has a newer schema.
        UsageError: the weights fit several models, or the stated model is unknown or not the one in the file.
    """
    require_file(path)
    model = options.model
    content = safe_load(path, allow_any_class=model is not None)
    fields = as_plain_dict(content) or {}
    if not isinstance(fields.get("spec"), str):
        spec, weights = read_legacy_checkpoint(path, content, model)
        return Checkpoint(options.overrides.apply(spec), weights, {})
    spec = _with_current_recipe(ModelSpec.from_json(fields["spec"], str(path)))
    if not isinstance(fields.get("model"), dict) or not isinstance(fields.get("training"), dict):
        raise ModelFileError(f"{path} contains no weights", "use a .pth file written by `cifarx train`")
    if model is not None and model != spec.model:
        raise UsageError(f"{path} is a checkpoint of {spec.model}, not of {model}", "leave out --model")
    return Checkpoint(options.overrides.apply(spec), fields["model"], fields["training"])


def _with_current_recipe(spec: ModelSpec) -> ModelSpec:
    """Replace the recipe field names of earlier versions."""
    if spec.training is None:
        return spec
    recipe = rename_old_fields(spec.training.recipe)
    return msgspec.structs.replace(spec, training=msgspec.structs.replace(spec.training, recipe=recipe))


def weights_sha256(weights: StateDict) -> str:
    """Return the sha256 of a state dict: the name, dtype, shape and little-endian bytes of every tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
