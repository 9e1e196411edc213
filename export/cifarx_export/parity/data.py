"""The images of the parity check: a test split at the model's input size, with training images where it is small."""

from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import ModelSpec
from cifarx_train.binomial import CONFIDENCE, floor_percent, lower_bound
from cifarx_train.data.dataset import LabeledImages, OnError, evenly_spaced, fingerprint
from cifarx_train.data.selection import DataSource, select_dataset_for_model

MIN_IMAGES: Final = 1000
"""Number of images up to which training images join the test images."""

FEW_IMAGES: Final = 100
"""Below this number of images, a check that passes proves so little that it carries a warning."""

_MIN_CALIBRATION: Final = 256
"""Training images outside the parity check that are enough to calibrate int8 on, half of them to compare on."""

_STAND_INS: Final = ("auto", "builtin")


class ParityData(NamedTuple):
    """The images of a parity check.

    Attributes:
        images: uint8 (N, height, width, channels) at the network's input size: the test images, then those that joined.
        labels: classes of the model, (N,), or None if it does not have all classes of the dataset, so that there is no
            accuracy.
        name: name of the dataset.
        fingerprint: SHA-256 of images, labels and class names.
        training_rows: positions in the training split of the images that joined.
        training_total: number of images of the training split, if any joined.
        stands_in: whether the images are drawings, and the network was trained on others.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    name: str
    fingerprint: str
    training_rows: tuple[int, ...] = ()
    training_total: int = 0
    stands_in: bool = False

    @property
    def test_images(self) -> int:
        """The number of test images, which are the first ones. The accuracy is measured on these alone."""
        return len(self.images) - len(self.training_rows)

    @property
    def shares_calibration(self) -> bool:
        """Whether int8 is calibrated on images of this check, because too few training images are left."""
        return len(self.training_rows) > 0 and self.training_total - len(self.training_rows) < _MIN_CALIBRATION

    def warnings(self) -> tuple[str, ...]:
        """Return what a result on these images does not prove."""
        count, found = len(self.images), []
        if count < FEW_IMAGES:
            bound = f"even an agreement of 100% proves only {floor_percent(lower_bound(count, count))}"
            found.append(f"only {count} images: {bound} with {CONFIDENCE:.0%} confidence")
        if self.stands_in:
            found.append(f"the images are the {self.name}, and not like those that the network was trained on")
        return tuple(found)

    def describe(self) -> str:
        """Return how many images of which splits these are."""
        if not self.training_rows:
            return f"{len(self.images):,} images of {self.name}"
        return f"{self.test_images:,} test and {len(self.training_rows):,} training images of {self.name}"


def load_parity_data(spec: ModelSpec, name: str | DataSource, on_error: OnError = "raise") -> ParityData:
    """Load a test split at the model's input size. Training images join it if it has fewer than `MIN_IMAGES`.

    Args:
        spec: spec of the model to check.
        name: value of `--data`; `auto` uses the dataset the model was trained on, if it can be found.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them with a warning.

    Raises:
        DataError: the dataset is missing or damaged, or the one the model was trained on cannot be found.
    """
    record = spec.training.data if spec.training else None
    dataset = select_dataset_for_model(record, name, on_error)
    checked = dataset.load("test", spec.input)
    rows: tuple[int, ...] = ()
    total = 0
    if len(checked) < MIN_IMAGES:
        training = dataset.load("train", spec.input)
        total = len(training)
        chosen = evenly_spaced(total, MIN_IMAGES - len(checked))
        rows = tuple(chosen.tolist())
        checked = LabeledImages(
            np.concatenate([checked.images, training.images[chosen]]),
            np.concatenate([checked.labels, training.labels[chosen]]),
        )
    labels = _model_labels(checked.labels, dataset.class_names, spec.class_names)
    stands_in = dataset.kind == "builtin" and (record is None or record.kind != "builtin")
    digest = fingerprint(checked, dataset.class_names)
    return ParityData(checked.images, labels, dataset.name, digest, rows, total, stands_in)


def name_classes(spec: ModelSpec, name: str | DataSource, on_error: OnError = "raise") -> ModelSpec:
    """Return the spec with the class names of the dataset, if nobody stated others and their number is the same.

    Only a dataset that the user names can state them: a folder, an archive or `cifar10`. The built-in drawings stand in
    for images that are not there, whatever their classes.

    Args:
        spec, name, on_error: see `load_parity_data`.
    """
    if "class_names" not in spec.assumed or str(name) in _STAND_INS:
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


def load_training_images(
    spec: ModelSpec,
    name: str | DataSource,
    count: int,
    on_error: OnError = "raise",
    checked: ParityData | None = None,
) -> NDArray[np.uint8]:
    """Load images of the training split, evenly spaced over it, at the model's input size.

    Images of the parity check are left out, unless `ParityData.shares_calibration` says that too few others are left.

    Args:
        spec, name, on_error: see `load_parity_data`.
        count: number of images; all images are returned if there are fewer.
        checked: the images of the parity check, from the same dataset.

    Returns:
        uint8 (count, height, width, channels).

    Raises:
        DataError: the dataset is missing or damaged.
    """
    dataset = select_dataset_for_model(spec.training.data if spec.training else None, name, on_error)
    images = dataset.load("train", spec.input).images
    rows = np.arange(len(images))
    if checked is not None and not checked.shares_calibration:
        rows = np.delete(rows, list(checked.training_rows))
    return images[rows[evenly_spaced(len(rows), count)]]
