"""Select a dataset from the value of `--data`."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from cifarx_serve.errors import DataError, FallbackWarning, UsageError
from cifarx_serve.spec import DataRecord
from cifarx_train.data.dataset import Dataset, OnError
from cifarx_train.data.image_folder import open_image_dataset
from cifarx_train.data.synthetic.dataset import SyntheticDataset

DATA_ENV_VAR = "CIFARX_DATA"


class _Options(NamedTuple):
    """How to read image files: the arguments of `select_dataset` for folders and archives."""

    on_error: OnError
    split_fraction: float | None
    labels: Path | None

    def require_unused(self, name: str) -> None:
        """Raise a UsageError if a dataset that has splits and labels shall be split or labeled."""
        for option, value in (("--split", self.split_fraction), ("--labels", self.labels)):
            if value is not None:
                raise UsageError(f"{option} {value} does not apply to --data {name}", "leave it out")


def select_dataset(
    name: str, on_error: OnError = "raise", *, split_fraction: float | None = None, labels: Path | None = None
) -> Dataset:
    """Return the dataset for a value of `--data`.

    Args:
        name: "auto", "cifar10", "builtin", or the path of a folder or `.tar.gz` of images. "auto" is the path in
            `$CIFARX_DATA` if it is set, otherwise CIFAR-10, otherwise the synthetic dataset, with a warning. Only
            "auto" falls back.
        on_error: "raise" a `DataError` for files that cannot be read as images, or "skip" them with a warning.
        split_fraction: the part of the images to hold out as the test split, for images that are not split.
        labels: a CSV file with the paths and labels of the images, for images that are not in folders of classes.

    Raises:
        DataError: the dataset is missing or damaged.
        UsageError: `split_fraction` or `labels` is given for a dataset that has splits and labels itself.
    """
    options = _Options(on_error, split_fraction, labels)
    if name == "auto":
        return _auto(options)
    if name not in ("builtin", "cifar10"):
        return _from_path(Path(name), options)
    options.require_unused(name)
    return _named(name)


def _named(name: str) -> Dataset:
    if name == "builtin":
        return SyntheticDataset()
    from cifarx_train.data.cifar10 import download_cifar10

    return download_cifar10()


def select_dataset_for_model(
    record: DataRecord | None,
    name: str,
    on_error: OnError = "raise",
    *,
    split_fraction: float | None = None,
    labels: Path | None = None,
) -> Dataset:
    """Return the dataset for a value of `--data` in a command about a trained model.

    This is `select_dataset`, but "auto" selects the dataset that the model was trained on if `$CIFARX_DATA` is not set.

    Args:
        record: the training data that is recorded in the model's spec, if any.
        name: as for `select_dataset`.
        on_error, split_fraction, labels: as for `select_dataset`. By default, images are split and labeled as they were
            for the training.

    Raises:
        DataError, UsageError: as for `select_dataset`.
    """
    options = _Options(on_error, split_fraction, labels)
    if name != "auto" or record is None or os.environ.get(DATA_ENV_VAR):
        return select_dataset(name, on_error, split_fraction=split_fraction, labels=labels)
    options.require_unused(record.name)
    if record.kind in ("builtin", "cifar10"):
        try:
            return _named(record.kind)
        except DataError as error:
            return _fall_back(error.problem)
    return _fall_back(f"the model was trained on {record.name}, whose path is not known (set --data or {DATA_ENV_VAR})")


def _auto(options: _Options) -> Dataset:
    if path := os.environ.get(DATA_ENV_VAR):
        return _from_path(Path(path), options)
    options.require_unused("auto")
    try:
        return _named("cifar10")
    except DataError as error:
        return _fall_back(error.problem)


def _fall_back(reason: str) -> Dataset:
    warnings.warn(f"using the BUILT-IN DRAWINGS, not photographs: {reason}", FallbackWarning, stacklevel=3)
    return SyntheticDataset()


def _from_path(path: Path, options: _Options) -> Dataset:
    if not path.exists():
        raise DataError(
            f"dataset {path} does not exist",
            "use auto, cifar10, builtin, or the path of a folder or .tar.gz of images",
        )
    if path.is_dir() and not (path / "train").is_dir():
        from cifarx_train.data.cifar10 import Cifar10Dataset, contains_cifar10

        if contains_cifar10(path):
            return Cifar10Dataset(path)
        absolute = Path(os.path.abspath(path))  # noqa: PTH100 - unlike resolve(), this keeps the name of a symbolic link
        if absolute.name == "cifar-10-batches-py":
            return Cifar10Dataset(absolute.parent)
    options.require_unused(str(path))
    return open_image_dataset(path, options.on_error)
