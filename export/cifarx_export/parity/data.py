"""The images of the parity check: a test split at the model's input size."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import ModelSpec
from cifarx_train.data.dataset import OnError, fingerprint
from cifarx_train.data.selection import select_dataset_for_model


class ParityData(NamedTuple):
    """The images of a parity check.

    Attributes:
        images: uint8 (N, height, width, channels) at the network's input size.
        labels: (N,), or None if the classes of the dataset are not the model's, so that there is no accuracy.
        name: name of the dataset.
        fingerprint: SHA-256 of images, labels and class names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    name: str
    fingerprint: str


def load_parity_data(spec: ModelSpec, name: str, on_error: OnError = "raise") -> ParityData:
    """Load a test split at the model's input size.

    Args:
        spec: spec of the model to check.
        name: value of `--data`; `auto` uses the dataset the model was trained on, if it can be found.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them with a warning.

    Raises:
        DataError: the dataset is missing or damaged.
    """
    dataset = select_dataset_for_model(spec.training.data if spec.training else None, name, on_error)
    split = dataset.load("test", spec.input)
    labels = split.labels if dataset.class_names == spec.class_names else None
    return ParityData(split.images, labels, dataset.name, fingerprint(split, dataset.class_names))


def load_training_images(spec: ModelSpec, name: str, count: int, on_error: OnError = "raise") -> NDArray[np.uint8]:
    """Load images of the training split, evenly spaced over it, at the model's input size.

    Args:
        spec, name, on_error: see `load_parity_data`.
        count: number of images; all images are returned if there are fewer.

    Returns:
        uint8 (count, height, width, channels).

    Raises:
        DataError: the dataset is missing or damaged.
    """
    dataset = select_dataset_for_model(spec.training.data if spec.training else None, name, on_error)
    images = dataset.load("train", spec.input).images
    return images[evenly_spaced(len(images), count)]


def evenly_spaced(total: int, count: int) -> NDArray[np.int64]:
    """Return `count` positions, or `total` if that is smaller, evenly spaced over `range(total)`."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
