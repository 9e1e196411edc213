"""Checkpoints: written whole or not at all, and read without running a byte of theirs."""

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from cifarx_serve.backends.base import require_file
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.files.checksum import seal
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.legacy.reader import read_legacy_checkpoint
from cifarx_train.checkpoints.legacy.safe_unpickle import load_safely, plain_dict
from cifarx_train.models.registry import network

State: TypeAlias = dict[str, Any]

SUFFIX = ".pth"


class Checkpoint(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        spec: what the model is and how it was trained.
        model: the network's state dict, on the CPU.
        training: what a bit-exact continuation needs: optimizer, random states, step.
    """

    spec: ModelSpec
    model: State
    training: State

    def build(self) -> nn.Module:
        """The network with its weights, on the CPU, in eval mode.

        Raises:
            UsageError: a network that this version does not know.
            ModelFileError: weights of another network than the spec says.
        """
        module = network(self.spec.model, stem=self.spec.stem).build(len(self.spec.class_names), self.spec.input)
        try:
            module.load_state_dict(self.model)
        except (RuntimeError, AttributeError) as error:  # the latter for keys that are not text
            reason = " ".join(str(error).split())
            raise ModelFileError(f"the weights are not those of {self.spec.model} ({reason})", "train again") from error
        return module.eval()


def checkpoint_path(folder: Path, model: str, epoch: int) -> Path:
    """`{model}_{epoch}.pth`; epochs count from 0."""
    return folder / f"{model}_{epoch}{SUFFIX}"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a dict of tensors and plain types, readable with `torch.load(weights_only=True)`.

    Raises:
        OutputError: the place cannot be written.
    """
    content = {"spec": checkpoint.spec.to_json(), "model": checkpoint.model, "training": checkpoint.training}
    buffer = io.BytesIO()  # PyTorch's writer turns a full disk into an error of its own, without the reason
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        seal(temporary)


def load_checkpoint(path: Path, model: str | None = None) -> Checkpoint:
    """Read a checkpoint, or a `.pth` file as the training notes write it, on the CPU wherever it was saved.

    Args:
        path: the file.
        model: the network's name, for a file that does not say it itself.

    Raises:
        ModelFileError: no such file, damaged, or without the weights of a network that is known.
        SpecError: its spec is malformed or of a newer schema.
        UsageError: the weights may be of several networks, or `model` is none or not the checkpoint's.
    """
    require_file(path)
    content = load_safely(path, any_class=model is not None)
    held = plain_dict(content) or {}
    if not isinstance(held.get("spec"), str):
        spec, weights = read_legacy_checkpoint(path, content, model)
        return Checkpoint(spec, weights, {})
    spec = ModelSpec.from_json(held["spec"], str(path))
    if not isinstance(held.get("model"), dict) or not isinstance(held.get("training"), dict):
        raise ModelFileError(f"{path} lacks its weights", "give a .pth file that `cifarx train` wrote")
    if model is not None and model != spec.model:
        raise UsageError(f"{path} is a checkpoint of {spec.model}, not of {model}", "leave --model out")
    return Checkpoint(spec, held["model"], held["training"])


def weights_sha256(weights: State) -> str:
    """sha256 over a state dict: each name, type and shape, and the little-endian bytes of each tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
