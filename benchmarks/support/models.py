"""The models that the benchmarks measure."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cifarx_export.export import export
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, save_checkpoint
from cifarx_train.data.selection import select_dataset, select_dataset_for_model
from cifarx_train.models.registry import get_architecture


@dataclass(frozen=True)
class Models:
    """A checkpoint and its artifacts, by backend name, and the images to compare them on.

    Attributes:
        network: name of the network.
        files: model file per backend name.
        images: uint8 (N, height, width, 3), the test split.
        data: name of the dataset.
    """

    network: str
    files: dict[str, Path]
    images: NDArray[np.uint8]
    data: str


def exported(checkpoint: Path, folder: Path, data: str = "auto", progress: Progress = silent) -> Models:
    """Export a checkpoint to TorchScript and ONNX; both must pass the parity check on the dataset.

    The accuracy may be chance: initial weights have no other.
    """
    results = export(
        checkpoint, ["torchscript", "onnx"], data=data, out=folder, allow_chance_accuracy=True, progress=progress
    )
    assert all(result.report.summary.passed for result in results)
    torchscript, onnx = (result.path for result in results)
    spec = read_spec(checkpoint)
    chosen = select_dataset_for_model(spec.training.data if spec.training else None, data)
    files = {"pytorch": checkpoint, "torchscript": torchscript, "onnxruntime": onnx}
    return Models(spec.model, files, chosen.load("test", spec.input).images, chosen.name)


def untrained(name: str, path: Path) -> Path:
    """Save a checkpoint of a network with its initial weights: training does not change its speed."""
    torch.manual_seed(0)
    spec = ModelSpec(
        model=name, class_names=tuple(select_dataset("builtin").class_names), input=get_architecture(name).input
    )
    save_checkpoint(path, Checkpoint(spec, get_architecture(name).build(len(spec.class_names)).state_dict(), {}))
    return path
