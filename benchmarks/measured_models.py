"""What the benchmarks measure."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Models:
    """One checkpoint and its artifacts, and the images they are compared on."""

    files: dict[str, Path]
    images: NDArray[np.uint8]
    data: str
