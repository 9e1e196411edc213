"""Reads the labels of images from a CSV file, as Kaggle's competitions and many annotation tools write them.

The file has a column of paths or of file names, with or without suffix, one of labels, and maybe one of splits.
"""

import csv
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from cifarx_serve.errors import DataError, error_message
from cifarx_serve.files.regular_file import require_regular_file
from cifarx_serve.images.suffixes import suffix_of
from cifarx_serve.system.terminal import encodable
from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.inventory import Inventory, listed
from cifarx_train.data.links import normalize
from cifarx_train.data.splits import Fraction, assign_splits, split_of, split_of_file

_PATH_COLUMNS: Final = (
    "path", "filepath", "file_path", "image_path", "img_path", "file", "filename", "file_name", "image", "image_name",
    "image_file", "image_id", "imageid", "img", "img_name", "name", "id", "uuid",
)  # fmt: skip
_LABEL_COLUMNS: Final = (
    "label", "class", "category", "target", "label_name", "class_name", "classname", "category_name", "labels", "y",
)  # fmt: skip
_SPLIT_COLUMNS: Final = ("split", "set", "subset", "partition", "dataset", "data set", "usage")


class LabelFile:
    """The labels of images, by path.

    Args:
        path: a CSV file, with a header or with the columns path and label; its columns are separated by commas,
            semicolons or tabs.

    Raises:
        DataError: the file cannot be read, or its columns are not recognized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            require_regular_file(path)
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path} ({error_message(error)})", "check --labels") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        rows = _parse(content.decode("utf-8-sig", errors="surrogateescape"), path)
        if not rows:
            raise DataError(f"{path} is empty", "give a CSV file with the columns path and label")
        self._columns = _find_columns(rows[0], path)
        self._rows = rows[1:] if self._columns.has_header else rows

    def arrange(self, inventory: Inventory, fraction: Fraction | None) -> Catalog:
        """Return the catalog of the images that have labels, in the order of the file.

        A path is relative to the dataset or to the file with the labels. It can also be the name of a file in any
        folder, if no other file has it; and the suffix can be missing.

        Args:
            inventory: of the dataset.
            fraction: the part of the images to hold out, if there is neither a column of splits nor a first folder of
                each path that is called after one.

        Raises:
            DataError, UsageError: as for `splits.assign_splits`; or no path is that of an image, a path is that of
                several images, or an image has several labels.
        """
        finder = _ImageFinder(inventory, self.path)
        labels: dict[str, str] = {}
        splits: dict[str, Split | None] = {}
        columns = self._columns
        for number, row in enumerate(self._rows, start=2 if columns.has_header else 1):
            where = f"{encodable(self.path.name)}, row {number}"
            if len(row) <= max(columns.path, columns.label) or not row[columns.label].strip():
                inventory.leave_out("without a label", where, unit="rows")
                continue
            text, label = row[columns.path].strip(), row[columns.label].strip()
            image = finder.find(text, where)
            if image is None:
                inventory.leave_out("without an image", text, unit="rows")
            elif labels.setdefault(image, label) != label:
                raise inventory.error(
                    f"has an image with the labels {labels[image]} and {label} in {where}", "give one label per image"
                )
            else:
                splits[image] = self._split(row, image)
        if not labels:
            raise inventory.error(
                f"has no image of {self.path}, whose first path is {encodable(self._rows[0][columns.path])}"
                if self._rows
                else f"has no labels in {self.path}",
                "give paths relative to --data or to the file",
            )
        if unlabeled := [image for image in inventory.images if image not in labels]:
            inventory.leave_out(f"without a label in {encodable(self.path.name)}", unlabeled[0], len(unlabeled))
        return self._assign(labels, splits, fraction, inventory)

    def _split(self, row: list[str], image: str) -> Split | None:
        column = self._columns.split
        if column is None:
            return split_of(image.partition("/")[0])
        return split_of(row[column].strip()) if len(row) > column else None

    def _assign(
        self, labels: dict[str, str], splits: dict[str, Split | None], fraction: Fraction | None, inventory: Inventory
    ) -> Catalog:
        found: defaultdict[Split, list[Entry]] = defaultdict(list)
        unsplit: list[Entry] = []
        for image, label in labels.items():
            split = splits[image]
            (found[split] if split else unsplit).append(Entry(label, image, image))
        if self._columns.split is None and (unsplit or set(found) == {"train"}):
            # A folder such as train/ may contain all images of a competition, or be one of many folders.
            unsplit = [Entry(label, image, image) for image, label in labels.items()]
            found.clear()
        elif unsplit:
            inventory.leave_out(f"of no split in {encodable(self.path.name)}", unsplit[0].path, len(unsplit))
            unsplit = []
        return assign_splits(found, unsplit, fraction, inventory)


class _Columns(NamedTuple):
    """The positions of the columns."""

    path: int
    label: int
    split: int | None
    has_header: bool


def _parse(text: str, path: Path) -> list[list[str]]:
    first = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        rows = list(csv.reader(text.splitlines(keepends=True), delimiter=delimiter))
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error})", "check --labels") from error
    return [row for row in rows if any(cell.strip() for cell in row)]


def _find_columns(first: list[str], path: Path) -> _Columns:
    names = [cell.strip().lower() for cell in first]
    image, label, split = (_first_of(known, names) for known in (_PATH_COLUMNS, _LABEL_COLUMNS, _SPLIT_COLUMNS))
    if image is None and label is None:
        if len(names) == 2:
            return _Columns(0, 1, None, has_header=False)
        if len(names) == 3 and split_of(names[2]):
            return _Columns(0, 1, 2, has_header=False)
    others = [column for column in range(len(names)) if column not in (image, label, split)]
    if len(others) == 1:  # such as `id,breed`
        image, label = (others[0] if column is None else column for column in (image, label))
    if image is None or label is None or image == label:
        missing = "paths" if image is None else "labels"
        raise DataError(
            f"{path} has no known column of {missing} among {listed(first)}", "call the columns path and label"
        )
    return _Columns(image, label, split, has_header=True)


def _first_of(known: Iterable[str], names: list[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


class _ImageFinder:
    """Finds the image that a text in the file with the labels means."""

    def __init__(self, inventory: Inventory, label_file: Path) -> None:
        self._inventory = inventory
        self._images = set(inventory.images)
        self._root = Path(os.path.abspath(inventory.path))  # noqa: PTH100 - unlike resolve(), this keeps links
        self._folder = Path(os.path.abspath(label_file)).parent  # noqa: PTH100
        self._split = split_of_file(label_file.name)
        self._by_name: defaultdict[str, list[str]] = defaultdict(list)
        for image in inventory.images:
            name = image.rpartition("/")[2]
            for text in {image, _without_suffix(image), name, _without_suffix(name)}:
                self._by_name[text].append(image)

    def find(self, text: str, where: str) -> str | None:
        """Return the path of the image, or None if there is none in the dataset.

        Raises:
            DataError: there are several.
        """
        path = text.replace("\\", "/")
        for candidate in (normalize(path), self._relative_to_folder(path)):
            if candidate in self._images:
                return candidate
        for candidate in (normalize(path), path.rpartition("/")[2]):
            images = self._preferred(self._by_name.get(candidate or "", []))
            if len(images) > 1:
                problem = f"has {len(images)} images that {where} can mean ({listed(images)})"
                raise self._inventory.error(problem, "give the paths of the images")
            if images:
                return images[0]
        return None

    def _preferred(self, images: list[str]) -> list[str]:
        """Return the images in the folder that is called like the file: `train/` for `train_labels.csv`."""
        if len(images) < 2 or self._split is None:
            return images
        return [image for image in images if self._split in map(split_of, image.split("/")[:-1])] or images

    def _relative_to_folder(self, path: str) -> str | None:
        absolute = os.path.normpath(self._folder / path)
        return os.path.relpath(absolute, self._root) if absolute.startswith(f"{self._root}{os.sep}") else None


def _without_suffix(name: str) -> str:
    return name[: len(name) - len(suffix_of(name))]
