"""What every data set is: named classes, and two splits of labelled images."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import InputSpec

Split: TypeAlias = Literal["train", "test"]


@dataclass(frozen=True)
class LabelledImages:
    """A split in memory: `images` uint8 (N, height, width, 3) RGB, `labels` int64 (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


class DataSet(ABC):
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
    def load(self, split: Split, spec: InputSpec) -> LabelledImages:
        """Read a split, every image at the size that `spec` asks for.

        Raises:
            DataError: something of it is absent, empty or damaged.
        """


def fingerprint(data: LabelledImages, class_names: tuple[str, ...]) -> str:
    """sha256 over the class names, the pixels and the labels: equal only for equal data in equal order."""
    digest = hashlib.sha256(repr((class_names, data.images.shape)).encode())
    digest.update(np.ascontiguousarray(data.images).data)
    digest.update(data.labels.astype("<i8").data)
    return digest.hexdigest()
