"""One small trained model with its artifacts, as the tests get it."""

from pathlib import Path
from typing import NamedTuple


class Trained(NamedTuple):
    """A folder with one trained Lzh and its artifacts; tests must not write there."""

    folder: Path
    checkpoint: Path
    onnx: Path
    torchscript: Path
