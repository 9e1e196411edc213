"""The images of a training run: the splits of its dataset, and what each image is used for."""

from typing import Final, NamedTuple

import numpy as np
import torch

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import DataRecord, InputSpec
from cifarx_train.calibration import MIN_IMAGES
from cifarx_train.class_balance import image_weights, require_class_names
from cifarx_train.data.dataset import Dataset, LabeledImages, fingerprint
from cifarx_train.data.loaders.base import Loader
from cifarx_train.data.loaders.selection import select_loader
from cifarx_train.data.loaders.subset import stratified_split
from cifarx_train.recipes import Recipe

_HELD_OUT: Final = 0.1
"""The part of the training images that the temperature is fitted to where there is no val split."""


class Splits(NamedTuple):
    """The splits of a dataset, and the record of them for the spec.

    Attributes:
        train: the images to train on.
        val: the images to compare epochs by, or None to compare them by the test images.
        test: the images that the accuracy of the result is measured on.
        record: their names, numbers and fingerprints.
    """

    train: LabeledImages
    val: LabeledImages | None
    test: LabeledImages
    record: DataRecord

    @staticmethod
    def load(dataset: Dataset, spec: InputSpec) -> "Splits":
        """Read the splits.

        Raises:
            DataError: a part of the dataset is missing, empty or damaged.
        """
        train = dataset.load("train", spec)
        val = dataset.load("val", spec) if "val" in dataset.splits else None
        test = dataset.load("test", spec)
        names = dataset.class_names
        record = DataRecord(
            name=dataset.name,
            kind=dataset.kind,
            train_images=len(train),
            test_images=len(test),
            train_fingerprint=fingerprint(train, names),
            test_fingerprint=fingerprint(test, names),
            val_images=None if val is None else len(val),
            val_fingerprint=None if val is None else fingerprint(val, names),
            split_fraction=dataset.split_fraction,
            labels=dataset.labels,
        )
        return Splits(train, val, test, record)


class RunData(NamedTuple):
    """The images of a run by their use.

    Attributes:
        splits: the splits of the dataset.
        train: loads the images that are trained on.
        val, test: load the other splits.
        calibration: loads the images that the temperature is fitted to; None if the run is not calibrated.
    """

    splits: Splits
    train: Loader
    val: Loader | None
    test: Loader
    calibration: Loader | None

    @staticmethod
    def select(splits: Splits, recipe: Recipe, seed: int, device: torch.device) -> "RunData":
        """Load each split from where the device has the memory for it.

        To calibrate without a val split, a tenth of the training images of every class is held out: on those that a
        network was trained on, it is too sure of itself, and test images are only for tests.
        """
        test = select_loader(splits.test, device)
        val = None if splits.val is None else select_loader(splits.val, device)
        train = select_loader(splits.train, device)
        calibration = val if recipe.calibrate else None
        if recipe.calibrate and val is None:
            train, calibration = stratified_split(train, _HELD_OUT, seed)
        return RunData(splits, train, val, test, calibration)


def require_fitting_recipe(recipe: Recipe, splits: Splits, class_names: tuple[str, ...]) -> None:
    """Check the fields of a recipe that are about classes or need images.

    Raises:
        UsageError: the class weights are those of other classes, or there are too few images to calibrate.
    """
    if isinstance(recipe.class_weights, dict):
        require_class_names(recipe.class_weights, class_names)
    if not recipe.calibrate:
        return
    part, available = "the val split", 0 if splits.val is None else len(splits.val)
    if splits.val is None:
        part = f"a tenth of the {len(splits.train):,} training images"
        available = sum(round(_HELD_OUT * count) for count in np.bincount(splits.train.labels).tolist())
    if available < MIN_IMAGES:
        raise UsageError(
            f"--calibrate needs at least {MIN_IMAGES} images, but {part} has only {available}",
            "give more images, or leave --calibrate out",
        )


def class_counts(images: Loader, classes: int) -> tuple[int, ...]:
    """Return the number of images of each class."""
    return tuple(torch.bincount(images.labels.cpu(), minlength=classes).tolist())


def loss_weights(recipe: Recipe, class_names: tuple[str, ...], images: Loader) -> torch.Tensor | None:
    """Return what the loss of an image of each class is multiplied by, float32 (classes,), or None for nothing."""
    if recipe.class_weights is None:
        return None
    counts = class_counts(images, len(class_names))
    if recipe.sampler == "balanced":
        counts = tuple(map(int, map(bool, counts)))
    return image_weights(recipe.class_weights, class_names, counts).to(images.labels.device)
