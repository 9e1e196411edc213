"""A small trained model and its artifacts."""

from pathlib import Path
from typing import NamedTuple


class Trained(NamedTuple):
    """A directory with one trained Lzh and its artifacts. Tests must not write to it."""

    folder: Path
    checkpoint: Path
    onnx: Path
    torchscript: Path
