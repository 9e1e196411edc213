"""Saving and loading checkpoints. Files are written atomically and loaded without running any code in them."""

import copy
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
import torch
from torch import nn

from cifarx_serve.backends.base import require_file
from cifarx_serve.errors import FallbackWarning, ModelFileError
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.files.file_format import FileFormat, detect_format
from cifarx_serve.spec import ModelSource, ModelSpec
from cifarx_train.checkpoints.external.module_stub import as_plain_dict, check_name
from cifarx_train.checkpoints.external.reader import read_external_checkpoint
from cifarx_train.checkpoints.external.safetensors_file import load_safetensors
from cifarx_train.checkpoints.external.torch_file import load_torch_file
from cifarx_train.models.options import NO_OPTIONS, ModelOptions
from cifarx_train.models.outputs import outputs_error
from cifarx_train.models.sources import rebuild_architecture
from cifarx_train.recipes import rename_old_fields

StateDict: TypeAlias = dict[str, Any]

SUFFIX = ".pth"

_EXTRA_STATE: Final = "_extra_state"
"""The end of the key of what `nn.Module.get_extra_state` returns, which can be anything."""

_MAX_EXPANDED: Final = 1 << 30
"""The largest size of an expanded tensor, in bytes."""

SPEC_KEY = "cifarx.spec"
"""The key of the model spec in the metadata of a safetensors file."""


class Checkpoint(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        spec: what the model is and how it was trained.
        weights: the state dict of the model, on the CPU.
        training: the training state, from which a run resumes bit for bit: optimizer, random generators, step.
        module: returns a new module for the weights; None if the spec says what builds it.
    """

    spec: ModelSpec
    weights: StateDict
    training: StateDict
    module: Callable[[], nn.Module] | None = None

    def build(self) -> nn.Module:
        """Build the model and load its weights, on the CPU and in eval mode.

        Raises:
            UsageError: this version does not know the model, or the user has to name its code.
            ModelFileError: the weights do not match the model that the spec names.
        """
        module = self.module() if self.module else _rebuild(self.spec, NO_OPTIONS)
        try:
            module.load_state_dict(self.weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ModelFileError(
                f"the weights do not match the model {self.spec.model} ({reason})", "train the model again"
            ) from error
        return module.eval()


def checkpoint_path(directory: Path, model: str, epoch: int) -> Path:
    """Return the path `{model}_{epoch}.pth`. Epochs count from 0."""
    return directory / f"{model}_{epoch}{SUFFIX}"


def save_checkpoint(path: Path, checkpoint: Checkpoint, modified_ns: int | None = None) -> None:
    """Write a checkpoint as a dict of tensors and plain types, readable with `torch.load(weights_only=True)`.

    The tensors are copied to the CPU, so that machines without the training device can load the file.

    Args:
        path: the file.
        checkpoint: what to write.
        modified_ns: the modification time of the file, in nanoseconds since the epoch. Defaults to now.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {"spec": checkpoint.spec.to_json(), "model": checkpoint.weights, "training": checkpoint.training}
    buffer = io.BytesIO()  # when the disk is full, PyTorch's own file writer raises an error without the reason
    torch.save(_copy_to_cpu(content), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        write_checksum(temporary)
        if modified_ns is not None:
            os.utime(temporary, ns=(modified_ns, modified_ns))


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
    """Load a checkpoint of cifarx or of another program onto the CPU. No code in the file runs.

    A `FallbackWarning` says what was done with the weights of another program, and what is only assumed about them.

    Args:
        path: the file, whatever its name is: of `torch.save` or in the safetensors format.
        options: what the user states about the model.

    Raises:
        ModelFileError: the file is missing or damaged, or does not contain the weights of the network.
        SpecError: the spec in the file is malformed or has a newer schema, or what is stated is not valid.
        UsageError: the network or the weights have to be stated, or are not those in the file.
    """
    require_file(path)
    if detect_format(path) is FileFormat.SAFETENSORS:
        weights, metadata = load_safetensors(path)
        if SPEC_KEY in metadata:
            return _own_checkpoint(path, metadata[SPEC_KEY], weights, {}, options)
        return _external_checkpoint(path, weights, options, metadata)
    content = load_torch_file(path)
    if is_own(content):
        return _read_own(path, content, options)
    return _external_checkpoint(path, content, options, {})


def load_training_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint of `cifarx train`, from which a run can resume.

    Raises:
        ModelFileError: the file is missing or damaged, or another program wrote it.
        SpecError: the spec in the file is malformed or has a newer schema.
    """
    require_file(path)
    content = load_torch_file(path)
    if not is_own(content):
        raise ModelFileError(f"{path} contains no training state", "start a new run without --resume")
    return _read_own(path, content, NO_OPTIONS)


def is_own(content: Any) -> bool:
    """Return whether `save_checkpoint` wrote this content."""
    return isinstance((as_plain_dict(content) or {}).get("spec"), str)


def _read_own(path: Path, content: dict[str, Any], options: ModelOptions) -> Checkpoint:
    if not isinstance(content.get("model"), dict) or not isinstance(content.get("training"), dict):
        raise ModelFileError(f"{path} contains no weights", "use a .pth file written by `cifarx train`")
    _require_weights(path, content["model"])
    return _own_checkpoint(path, content["spec"], content["model"], content["training"], options)


def _require_weights(path: Path, weights: dict[Any, Any]) -> None:
    """Raise a ModelFileError if a state dict has other values than tensors and the extra state of modules."""
    for name, value in weights.items():
        check_name(path, name)
        if isinstance(value, torch.Tensor):
            # An expanded buffer is a view that can have more elements than the file has bytes.
            is_valid = value.nbytes <= max(_MAX_EXPANDED, value.untyped_storage().nbytes())
        else:
            is_valid = name.endswith(_EXTRA_STATE)
        if not is_valid:
            raise ModelFileError(f"{name!r} in {path} is no dense tensor", "use a .pth file written by `cifarx train`")


def _own_checkpoint(
    path: Path, document: str, weights: StateDict, training: StateDict, options: ModelOptions
) -> Checkpoint:
    stored = _with_current_recipe(ModelSpec.from_json(document, str(path)))
    spec = options.overrides.apply(stored)
    if spec.output_size != stored.output_size:
        source = stored.source or ModelSource(kind="builtin", name=stored.model)
        raise outputs_error(source, stored.output_size, spec.output_size)
    if options.model is not None:
        rebuild_architecture(spec, options)  # fails early if it is not the model of the file
    return Checkpoint(spec, weights, training, lambda: _rebuild(spec, options))


def _external_checkpoint(path: Path, content: Any, options: ModelOptions, metadata: dict[str, str]) -> Checkpoint:
    external = read_external_checkpoint(path, content, options, metadata)
    for note in external.notes:
        warnings.warn(note, FallbackWarning, stacklevel=3)
    return Checkpoint(external.spec, external.weights, {}, external.build)


def _rebuild(spec: ModelSpec, options: ModelOptions) -> nn.Module:
    return rebuild_architecture(spec, options).build(spec.output_size, spec.input)


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
