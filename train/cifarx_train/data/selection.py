"""Select a dataset from the value of `--data`."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from cifarx_serve.errors import DataError, FallbackWarning, UsageError
from cifarx_serve.spec import DataRecord
from cifarx_train.data.dataset import Dataset, OnError
from cifarx_train.data.image_dataset import open_image_dataset
from cifarx_train.data.label_file import LabelFile
from cifarx_train.data.splits import Fraction
from cifarx_train.data.synthetic.dataset import SyntheticDataset

DATA_ENV_VAR = "CIFARX_DATA"


class DataSource(NamedTuple):
    """A value of `--data`, and what the user says about the images.

    Attributes:
        name: see `select_dataset`.
        split_fraction: the part of the images to hold out as the test split, for images that are not split.
        labels: a CSV file with the paths and labels of the images, for images that are not in folders of classes.
    """

    name: str
    split_fraction: float | None = None
    labels: Path | None = None

    def __str__(self) -> str:
        return self.name


class _Options(NamedTuple):
    """How to read image files."""

    on_error: OnError
    source: DataSource
    record: DataRecord | None = None

    def require_unused(self, name: str) -> None:
        """Raise a UsageError if a dataset that has splits and labels shall be split or labeled."""
        for option, value in (("--split", self.source.split_fraction), ("--labels", self.source.labels)):
            if value is not None:
                remedy = "give the images with --data PATH" if name == "auto" else "leave it out"
                raise UsageError(f"{option} {value} does not apply to --data {name}", remedy)

    @property
    def fraction(self) -> Fraction | None:
        """The part of the images to hold out: the stated one, or that of the training data."""
        stated = self.source.split_fraction
        if stated is not None:
            if not 0 < stated < 1:
                problem = f"--split {stated:g} is not a part of the images"
                raise UsageError(problem, "give a number between 0 and 1, such as 0.2")
            return Fraction(stated)
        if self.record and self.record.split_fraction:
            return Fraction(self.record.split_fraction, stated=False)
        return None

    def label_file(self, data: Path) -> LabelFile | None:
        """Return the file with the labels: the stated one, or the one of the training data, in or beside a dataset."""
        if self.source.labels is not None:
            return LabelFile(self.source.labels)
        if self.record and self.record.labels:
            for folder in (data, data.parent):
                if (path := folder / self.record.labels).is_file():
                    return LabelFile(path)
        return None


def select_dataset(data: str | DataSource, on_error: OnError = "raise") -> Dataset:
    """Return the dataset for a value of `--data`.

    Args:
        data: "auto", "cifar10", "builtin", or the path of a folder, an archive or tables of images. "auto" is the path
            in `$CIFARX_DATA` if it is set, otherwise CIFAR-10, otherwise the synthetic dataset, with a warning. Only
            "auto" falls back.
        on_error: "raise" a `DataError` for files that cannot be read as images, or "skip" them with a warning.

    Raises:
        DataError: the dataset is missing or damaged.
        UsageError: `split_fraction` or `labels` is given for a dataset that has splits and labels itself.
    """
    options = _Options(on_error, _source(data))
    if options.source.name == "auto":
        return _auto(options)
    return _explicit(options)


def _source(data: str | DataSource) -> DataSource:
    return data if isinstance(data, DataSource) else DataSource(data)


def _explicit(options: _Options) -> Dataset:
    name = options.source.name
    if name not in ("builtin", "cifar10"):
        return _from_path(Path(name), options)
    options.require_unused(name)
    return _named(name)


def _named(name: str) -> Dataset:
    if name == "builtin":
        return SyntheticDataset()
    from cifarx_train.data.cifar10 import download_cifar10

    return download_cifar10()


def select_dataset_for_model(record: DataRecord | None, data: str | DataSource, on_error: OnError = "raise") -> Dataset:
    """Return the dataset for a value of `--data` in a command about a trained model.

    This is `select_dataset`, but "auto" selects the dataset that the model was trained on if `$CIFARX_DATA` is not set.
    The drawings stand in for CIFAR-10 alone, with a warning, and for no other images.

    Args:
        record: the training data that is recorded in the model's spec, if any.
        data, on_error: as for `select_dataset`. Images without splits or labels are split and labeled as they were for
            the training, unless `data` says how.

    Raises:
        DataError, UsageError: as for `select_dataset`.
    """
    options = _Options(on_error, _source(data), record)
    if options.source.name != "auto":
        return _explicit(options)
    if path := os.environ.get(DATA_ENV_VAR):
        return _from_path(Path(path), options)
    if record is not None and record.kind == "folder":
        raise DataError(
            f"the model was trained on {record.name}, whose path is not known",
            f"give it with --data PATH, or set {DATA_ENV_VAR}",
        )
    options.require_unused("auto" if record is None else record.name)
    try:
        return _named("cifar10" if record is None else record.kind)
    except DataError as error:
        if record is None:
            raise DataError(
                f"it is not known which images the model was trained on, and {error.problem}",
                f"give images like them with --data PATH, or set {DATA_ENV_VAR}; --data builtin takes the drawings",
            ) from error
        return _fall_back(error.problem)


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
            "use auto, cifar10, builtin, or the path of a folder, .zip, .tar.gz or .parquet of images",
        )
    if path.is_dir() and not (path / "train").is_dir():
        from cifarx_train.data.cifar10 import Cifar10Dataset, contains_cifar10

        if contains_cifar10(path):
            options.require_unused(str(path))
            return Cifar10Dataset(path)
        absolute = Path(os.path.abspath(path))  # noqa: PTH100 - unlike resolve(), this keeps the name of a symbolic link
        if absolute.name == "cifar-10-batches-py":
            options.require_unused(str(path))
            return Cifar10Dataset(absolute.parent)
    return open_image_dataset(path, options.on_error, options.fraction, options.label_file(path))
