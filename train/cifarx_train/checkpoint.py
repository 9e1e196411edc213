"""Checkpoints: written whole or not at all, and read without running a byte of theirs."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from cifarx_serve.atomic import atomic_path
from cifarx_serve.backends.base import require_file
from cifarx_serve.errors import ModelFileError
from cifarx_serve.spec import ModelSpec
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
        module = network(self.spec.model).build(len(self.spec.class_names))
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


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint on the CPU, wherever it was saved.

    Raises:
        ModelFileError: no such file, damaged, or not a checkpoint of ours.
        SpecError: its spec is malformed or of a newer schema.
    """
    require_file(path)
    remedy = "give a .pth file that `cifarx train` wrote"
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # PyTorch reads the weights without a look at their checksums
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers let damaged bytes raise almost anything
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise ModelFileError(f"{path} is not a checkpoint that can be read ({reason})", remedy) from error
    if not isinstance(content, dict) or not isinstance(content.get("spec"), str):
        raise ModelFileError(f"{path} is not a cifarx checkpoint", remedy)
    spec = ModelSpec.from_json(content["spec"], str(path))
    if not isinstance(content.get("model"), dict) or not isinstance(content.get("training"), dict):
        raise ModelFileError(f"{path} lacks its weights", remedy)
    return Checkpoint(spec, content["model"], content["training"])


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
