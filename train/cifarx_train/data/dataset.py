"""The interface of all datasets: named classes, and two or three splits of labeled images."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.images.reader import ImageSource
from cifarx_serve.spec import InputSpec

Split: TypeAlias = Literal["train", "val", "test"]
"""What images are for: the training itself, choosing between epochs, or measuring the accuracy at the end."""

OnError: TypeAlias = Literal["raise", "skip"]
"""What to do about files that cannot be read as images: raise a `DataError`, or skip them with a warning."""

_HASH_CHUNK: Final = 1 << 24  # bytes


class KnownFingerprint(NamedTuple):
    """A fingerprint that was computed before, for these class names."""

    class_names: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class LabeledImages:
    """The images and labels of a split.

    Attributes:
        images: uint8 (N, height, width, channels), RGB or grayscale. Cached images are memory-mapped read-only.
        labels: int64 (N,).
        file: the `.npy` file that contains exactly these images, which other processes can map too; None for images
            in memory.
        known_fingerprint: what `fingerprint` returns, if it was computed already.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    file: Path | None = None
    known_fingerprint: KnownFingerprint | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Picture(NamedTuple):
    """An image of a dataset as it is stored.

    Attributes:
        source: the file, its content, or pixels, for `cifarx_serve.images.reader.read_image`.
        label: the class, as in `LabeledImages.labels`.
    """

    source: ImageSource
    label: int


class Dataset(ABC):
    """A dataset. Images are not read before `load` is called.

    Attributes:
        kind: the type of dataset that is recorded in the spec.
        name: the display name. This is never a path, which would reveal details of the machine.
        split_fraction: the part of the images that was held out as the test split, if the dataset has no splits itself.
        labels: the name of the file with the labels, if they are not the names of folders. This is never a path.
    """

    kind: Literal["builtin", "cifar10", "folder"]
    name: str
    split_fraction: float | None = None
    labels: str | None = None

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that can be loaded: train and test, and val if the dataset has images to choose between epochs.

        Raises:
            DataError: a part of the dataset is missing, empty or damaged.
        """
        return ("train", "test")

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of the dataset is not used: one line per kind, such as "left out 3 files: 3 without a known suffix".

        Raises:
            DataError: the dataset cannot be listed.
        """
        return ()

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The class names, in label order."""

    @abstractmethod
    def sample(self, split: Split, count: int) -> list[Picture]:
        """Return this number of images as they are stored, evenly spaced over the split, or all if there are fewer.

        Args:
            split: one of `splits`.
            count: the number of images.

        Raises:
            DataError: a part of the dataset is missing, empty or damaged.
        """

    @abstractmethod
    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        """Read a split, with every image converted to grayscale, resized and cropped as `spec` says.

        Args:
            split: one of `splits`.
            spec: the input of the network.

        Raises:
            DataError: a part of the dataset is missing, empty or damaged.
        """


def evenly_spaced(total: int, count: int) -> NDArray[np.int64]:
    """Return `count` positions, or `total` if that is smaller, evenly spaced over `range(total)`."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def fingerprint(data: LabeledImages, class_names: tuple[str, ...]) -> str:
    """Return the SHA-256 of the class names, the pixels and the labels, in hexadecimal.

    Two splits have the same fingerprint only if they contain the same data in the same order.
    """
    if data.known_fingerprint and data.known_fingerprint.class_names == class_names:
        return data.known_fingerprint.sha256
    digest = hashlib.sha256(repr((class_names, data.images.shape)).encode())
    # In chunks, because memory-mapped images may be larger than the memory.
    rows = max(1, _HASH_CHUNK // max(1, data.images[:1].nbytes))
    for start in range(0, len(data.images), rows):
        digest.update(np.ascontiguousarray(data.images[start : start + rows]).data)
    digest.update(data.labels.astype("<i8").data)
    return digest.hexdigest()
