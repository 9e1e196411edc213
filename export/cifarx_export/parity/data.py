"""The images of the parity check: a test split at the model's input size."""

from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import ModelSpec
from cifarx_train.data.dataset import OnError, evenly_spaced, fingerprint
from cifarx_train.data.selection import select_dataset_for_model

_STAND_INS: Final = ("auto", "builtin")


class ParityData(NamedTuple):
    """The images of a parity check.

    Attributes:
        images: uint8 (N, height, width, channels) at the network's input size.
        labels: classes of the model, (N,), or None if it does not have all classes of the dataset, so that there is no
            accuracy.
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
    labels = _model_labels(split.labels, dataset.class_names, spec.class_names)
    return ParityData(split.images, labels, dataset.name, fingerprint(split, dataset.class_names))


def name_classes(spec: ModelSpec, name: str, on_error: OnError = "raise") -> ModelSpec:
    """Return the spec with the class names of the dataset, if nobody stated others and their number is the same.

    Only a dataset that the user names can state them: a folder, an archive or `cifar10`. The built-in drawings stand in
    for images that are not there, whatever their classes.

    Args:
        spec, name, on_error: see `load_parity_data`.
    """
    if "class_names" not in spec.assumed or name in _STAND_INS:
        return spec
    names = select_dataset_for_model(None, name, on_error).class_names
    if len(names) != len(spec.class_names):
        return spec
    assumed = tuple(part for part in spec.assumed if part != "class_names")
    return msgspec.structs.replace(spec, class_names=names, assumed=assumed)


def _model_labels(
    labels: NDArray[np.int64], dataset_names: tuple[str, ...], model_names: tuple[str, ...]
) -> NDArray[np.int64] | None:
    """Return the labels of a dataset as classes of the model, by their names; None if they are not unambiguous."""
    if any(model_names.count(name) != 1 for name in dataset_names):
        return None
    return np.array([model_names.index(name) for name in dataset_names])[labels]


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
