"""From what the user says, or does not say, to a data set."""

import os
import warnings
from pathlib import Path

from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.spec import DataRecord
from cifarx_train.data.dataset import Broken, Dataset
from cifarx_train.data.image_folder import open_image_files
from cifarx_train.data.synthetic.dataset import SyntheticDataset

ENVIRONMENT = "CIFARX_DATA"


def select_data(name: str, broken: Broken = "refuse") -> Dataset:
    """The data set for `--data`: auto, cifar10, builtin, or the path of a folder or `.tar.gz`.

    `auto` is `$CIFARX_DATA` where that is set, else CIFAR-10, else, with a warning, the built-in drawings. Only
    `auto` falls back. `broken` says whether image files that cannot be read are refused or left out with a warning.

    Raises:
        DataError: what was asked for is absent or damaged.
    """
    match name:
        case "auto":
            return _automatic(broken)
        case "builtin":
            return SyntheticDataset()
        case "cifar10":
            from cifarx_train.data.cifar10 import download

            return download()
    return _from_path(Path(name), broken)


def select_data_like(record: DataRecord | None, name: str, broken: Broken = "refuse") -> Dataset:
    """The data set for `--data` of a command about a model: `auto` prefers what the model was trained on.

    `broken` is as `select_data` has it.

    Raises:
        DataError: what was asked for is absent or damaged.
    """
    if name != "auto" or record is None or os.environ.get(ENVIRONMENT):
        return select_data(name, broken)
    if record.kind in ("builtin", "cifar10"):
        try:
            return select_data(record.kind)
        except DataError as error:
            return _fall_back(error.problem)
    return _fall_back(f"the model was trained on {record.name}, which is not named here (--data, {ENVIRONMENT})")


def _automatic(broken: Broken) -> Dataset:
    if path := os.environ.get(ENVIRONMENT):
        return _from_path(Path(path), broken)
    try:
        return select_data("cifar10")
    except DataError as error:
        return _fall_back(error.problem)


def _fall_back(reason: str) -> Dataset:
    warnings.warn(f"using the BUILT-IN DRAWINGS, not photographs: {reason}", FallbackWarning, stacklevel=3)
    return SyntheticDataset()


def _from_path(path: Path, broken: Broken) -> Dataset:
    if not path.exists():
        raise DataError(
            f"no such data set {path}", "use auto, cifar10, builtin, or the path of a folder or .tar.gz of images"
        )
    if path.is_dir() and not (path / "train").is_dir():
        from cifarx_train.data.cifar10 import Cifar10Set, has_batches

        if has_batches(path):
            return Cifar10Set(path)
        whole = Path(os.path.abspath(path))  # noqa: PTH100 - `.` has no name, and a link keeps its own
        if whole.name == "cifar-10-batches-py":
            return Cifar10Set(whole.parent)
    return open_image_files(path, broken)
