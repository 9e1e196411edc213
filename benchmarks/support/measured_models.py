"""What the benchmarks measure."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cifarx_export.export import export
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, save_checkpoint
from cifarx_train.data.selection import select_data, select_data_like
from cifarx_train.models.registry import network


@dataclass(frozen=True)
class Models:
    """One checkpoint and its artifacts by their backends' names, and the images they are compared on."""

    network: str
    files: dict[str, Path]
    images: NDArray[np.uint8]
    data: str


def exported(checkpoint: Path, folder: Path, data: str = "auto") -> Models:
    """A checkpoint, as TorchScript and as ONNX, each with its proof on a data set."""
    made = export(checkpoint, ["torchscript", "onnx"], data=data, out=folder)
    assert all(artifact.report.summary.passed for artifact in made)
    torchscript, onnx = (artifact.path for artifact in made)
    spec = read_spec(checkpoint)
    chosen = select_data_like(spec.training.data if spec.training else None, data)
    files = {"pytorch": checkpoint, "torchscript": torchscript, "onnxruntime": onnx}
    return Models(spec.model, files, chosen.load("test", spec.input).images, chosen.name)


def untrained(name: str, path: Path) -> Path:
    """A checkpoint of a network with the weights it begins with: it is as fast as any."""
    torch.manual_seed(0)
    spec = ModelSpec(model=name, class_names=tuple(select_data("builtin").class_names), input=network(name).input)
    save_checkpoint(path, Checkpoint(spec, network(name).build(len(spec.class_names)).state_dict(), {}))
    return path
