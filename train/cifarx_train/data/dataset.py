"""What every data set is: named classes, and two splits of labelled images."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import InputSpec

Split: TypeAlias = Literal["train", "test"]
Broken: TypeAlias = Literal["refuse", "skip"]
"""What to do about files that cannot be read as images: refuse the whole split, or leave them out and say so."""

_HASHED_AT_ONCE: Final = 1 << 24  # bytes


@dataclass(frozen=True)
class LabeledImages:
    """A split: `images` uint8 (N, height, width, 3) RGB, `labels` int64 (N,).

    Images kept on the disk are mapped read-only into memory. `file` is then the `.npy` file of exactly these images,
    which another process may map too; None for images that are in this process's memory alone.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Dataset(ABC):
    """A data set that can be read; nothing is read before `load`.

    Attributes:
        kind: how it is read, as the spec records it.
        name: what to call it; never a path, which would tell of the machine.
    """

    kind: Literal["builtin", "cifar10", "folder"]
    name: str

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The classes in label order."""

    @abstractmethod
    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        """Read a split, every image at the size that `spec` asks for.

        Raises:
            DataError: something of it is absent, empty or damaged.
        """


def fingerprint(data: LabeledImages, class_names: tuple[str, ...]) -> str:
    """sha256 over the class names, the pixels and the labels: equal only for equal data in equal order."""
    digest = hashlib.sha256(repr((class_names, data.images.shape)).encode())
    # In parts: images that are mapped from a file may be more than the memory holds.
    rows = max(1, _HASHED_AT_ONCE // max(1, data.images[:1].nbytes))
    for start in range(0, len(data.images), rows):
        digest.update(np.ascontiguousarray(data.images[start : start + rows]).data)
    digest.update(data.labels.astype("<i8").data)
    return digest.hexdigest()
