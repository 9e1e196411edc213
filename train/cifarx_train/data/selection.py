"""Select a dataset from the value of `--data`."""

import os
import warnings
from pathlib import Path

from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.spec import DataRecord
from cifarx_train.data.dataset import Dataset, OnError
from cifarx_train.data.image_folder import open_image_dataset
from cifarx_train.data.synthetic.dataset import SyntheticDataset

DATA_ENV_VAR = "CIFARX_DATA"


def select_dataset(name: str, on_error: OnError = "raise") -> Dataset:
    """Return the dataset for a value of `--data`.

    Args:
        name: "auto", "cifar10", "builtin", or the path of a folder or `.tar.gz` of images. "auto" is the path in
            `$CIFARX_DATA` if it is set, otherwise CIFAR-10, otherwise the synthetic dataset, with a warning. Only
            "auto" falls back.
        on_error: "raise" a `DataError` for files that cannot be read as images, or "skip" them with a warning.

    Raises:
        DataError: the dataset is missing or damaged.
    """
    match name:
        case "auto":
            return _auto(on_error)
        case "builtin":
            return SyntheticDataset()
        case "cifar10":
            from cifarx_train.data.cifar10 import download_cifar10

            return download_cifar10()
    return _from_path(Path(name), on_error)


def select_dataset_for_model(record: DataRecord | None, name: str, on_error: OnError = "raise") -> Dataset:
    """Return the dataset for a value of `--data` in a command about a trained model.

    This is `select_dataset`, but "auto" selects the dataset that the model was trained on if `$CIFARX_DATA` is not set.

    Args:
        record: the training data that is recorded in the model's spec, if any.
        name: as for `select_dataset`.
        on_error: as for `select_dataset`.

    Raises:
        DataError: the dataset is missing or damaged.
    """
    if name != "auto" or record is None or os.environ.get(DATA_ENV_VAR):
        return select_dataset(name, on_error)
    if record.kind in ("builtin", "cifar10"):
        try:
            return select_dataset(record.kind)
        except DataError as error:
            return _fall_back(error.problem)
    return _fall_back(f"the model was trained on {record.name}, whose path is not known (set --data or {DATA_ENV_VAR})")


def _auto(on_error: OnError) -> Dataset:
    if path := os.environ.get(DATA_ENV_VAR):
        return _from_path(Path(path), on_error)
    try:
        return select_dataset("cifar10")
    except DataError as error:
        return _fall_back(error.problem)


def _fall_back(reason: str) -> Dataset:
    warnings.warn(f"using the BUILT-IN DRAWINGS, not photographs: {reason}", FallbackWarning, stacklevel=3)
    return SyntheticDataset()


def _from_path(path: Path, on_error: OnError) -> Dataset:
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
    return open_image_dataset(path, on_error)
