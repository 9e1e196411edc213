"""Decides which images train a network, choose between its epochs, and test it."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.system.terminal import encodable
from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.hold_out import hold_out
from cifarx_train.data.inventory import Inventory, listed

SPLIT_NAMES: Final[dict[Split, tuple[str, ...]]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""The names of splits in use, in lower case. If a dataset has several of them, the first one is taken."""

_SPLITS: Final = {name: split for split, names in SPLIT_NAMES.items() for name in names}

_MIN_CLASSES: Final = 2

LAYOUT: Final = "train/<class>/<image> and test/<class>/<image> (or val/ or valid/ instead of test/)"


class Fraction(NamedTuple):
    """The part of the images to hold out as the test split.

    Attributes:
        value: between 0 and 1.
        stated: whether the user asked for it. Otherwise, it is how a model's training data were split, which applies
            only to data that have no splits.
    """

    value: float
    stated: bool = True


def split_of(name: str) -> Split | None:
    """Return the split that a folder, a file or a value is called after, such as "val" for `Validation`."""
    return _SPLITS.get(name.lower())


def split_of_file(path: str) -> Split | None:
    """Return the split that a table or a shard belongs to, by the start of its name or else by a folder.

    Examples are `data/train-00000-of-00002.parquet`, `validation_0.tar` and `default/test/0000.parquet`.
    """
    *folders, file = path.split("/")
    words = re.match("[A-Za-z]*", file)
    names = [words[0] if words else "", *reversed(folders)]
    return next((split for name in names if (split := split_of(name))), None)


def numbers_sorted(labels: Iterable[int | str]) -> tuple[str, ...]:
    """Return the names of classes that are known by their labels alone: by number if all are numbers, else by name."""
    names = {str(label) for label in labels}
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def assign_splits_of_files(
    found: Mapping[Split | None, Sequence[Entry]],
    fraction: Fraction | None,
    inventory: Inventory,
    kind: str,
    class_names: tuple[str, ...] | None = None,
    unit: Literal["files", "rows"] = "files",
) -> Catalog:
    """Return the catalog of a dataset in files that hold many images each, such as tables and shards.

    Args:
        found: the images of the files of each split, and under None those of files that name no split.
        fraction, inventory, class_names: as for `assign_splits`. By default, labels that are numbers are sorted as
            numbers.
        kind: what the files are called in messages.
        unit: what one image is called in messages.

    Raises:
        DataError, UsageError: as for `assign_splits`.
    """
    splits = {split: entries for split, entries in found.items() if split}
    unsplit = found.get(None, ())
    labels = {entry.class_name for entry in found.get("train") or unsplit}
    if splits and unsplit:
        inventory.leave_out(f"in {kind} that are of no split", unsplit[0].path, len(unsplit), unit)
        unsplit = ()
    return assign_splits(splits, unsplit, fraction, inventory, class_names or numbers_sorted(labels))


def assign_splits(
    found: Mapping[Split, Sequence[Entry]],
    unsplit: Sequence[Entry],
    fraction: Fraction | None,
    inventory: Inventory,
    class_names: tuple[str, ...] | None = None,
) -> Catalog:
    """Return the catalog of a dataset.

    A validation split is the test split of a dataset that has no other. Without either, images are held out.

    Args:
        found: the images of the splits that the dataset has. A split without any known class is not labeled.
        unsplit: the images of a dataset that has no splits.
        fraction: the part of the images to hold out, if any.
        inventory: of the dataset, for messages.
        class_names: the classes, in label order. By default, they are those of the training images, sorted.

    Raises:
        DataError: there are no test images, fewer than two classes, or classes without training images.
        UsageError: `fraction` is stated for a dataset that has test images.
    """
    splits = {split: tuple(entries) for split, entries in found.items() if entries}
    known = set(class_names or (entry.class_name for entry in splits.get("train") or unsplit))
    lines = _leave_out_unlabeled(splits, known, inventory)
    if "train" in splits and len(splits) > 1:
        if fraction and fraction.stated:
            problem = f"--split {fraction.value:g} does not apply to {inventory.path}, which has test images"
            raise UsageError(problem, "leave it out")
        if "test" not in splits:
            splits["test"] = splits.pop("val")
    else:
        splits = _hold_out(splits, tuple(unsplit), fraction, inventory)
        lines = []
    names = class_names or tuple(sorted(known))
    _require_classes(names, splits, inventory)
    ordered: dict[Split, tuple[Entry, ...]] = {split: splits[split] for split in SPLIT_NAMES if split in splits}
    return Catalog(names, ordered, (*inventory.lines(), *lines, *_missing_classes(names, ordered)))


def _leave_out_unlabeled(splits: dict[Split, tuple[Entry, ...]], known: set[str], inventory: Inventory) -> list[str]:
    """Remove the splits that have no class of the training images, and return what that means for the others."""
    for split in ("val", "test"):
        entries = splits.get(split, ())
        if entries and "train" in splits and not known & {entry.class_name for entry in entries}:
            inventory.leave_out(f"in a {split} split without labels", entries[0].class_name, len(entries))
            del splits[split]
            if split == "test" and "val" in splits:
                return [f"the val split of {inventory.name} is used for testing, because the test split has no labels"]
    return []


def _hold_out(
    splits: dict[Split, tuple[Entry, ...]],
    unsplit: tuple[Entry, ...],
    fraction: Fraction | None,
    inventory: Inventory,
) -> dict[Split, tuple[Entry, ...]]:
    if splits and "train" not in splits:
        raise inventory.error("has no training images", f"use the layout {LAYOUT}")
    images = splits.get("train", unsplit)
    if not images:
        raise inventory.error("has 0 class folders with images", f"use the layout {LAYOUT}")
    classes = Counter(entry.class_name for entry in images)
    if len(classes) < _MIN_CLASSES:
        raise _too_few_classes(tuple(classes), inventory)
    if fraction is None:
        raise inventory.error(
            f"has {_count(classes)} with images ({listed(classes)}), but no test images",
            f"use --split 0.2 to hold out 20% of the images of each class, or the layout {LAYOUT}",
        )
    if single := [name for name, count in classes.items() if count < 2]:
        problem = f"has only one image of {listed(single)}, which cannot be a training image and a test image"
        raise inventory.error(problem, "add images of it, or remove it")
    train, test = hold_out(images, fraction.value)
    return {"train": train, "test": test}


def _require_classes(names: tuple[str, ...], splits: Mapping[Split, tuple[Entry, ...]], inventory: Inventory) -> None:
    if len(names) < _MIN_CLASSES:
        raise _too_few_classes(names, inventory)
    for split, entries in splits.items():
        if unknown := {entry.class_name for entry in entries}.difference(names):
            raise inventory.error(
                f"has {_count(unknown)} in the {split} split without training images ({listed(unknown)})",
                "add training images, or remove the others",
            )
    if unencodable := [name for name in names if encodable(name) != name]:
        raise inventory.error(f"has the class {encodable(unencodable[0])}, whose name is not valid UTF-8", "rename it")


def _too_few_classes(names: Collection[str], inventory: Inventory) -> DataError:
    tables = [str(inventory.path / name) for name in inventory.others if name.lower().endswith(".csv")]
    remedy = f"use the layout {LAYOUT}, or give the labels with --labels {tables[0] if tables else 'FILE.csv'}"
    return inventory.error(f"has {_count(names)} with training images ({listed(names)})", remedy)


def _missing_classes(names: tuple[str, ...], splits: Mapping[Split, tuple[Entry, ...]]) -> list[str]:
    """Return a line for each split in which some classes have no images."""
    lines = []
    for split, entries in splits.items():
        present = {entry.class_name for entry in entries}
        if missing := [name for name in names if name not in present]:
            lines.append(f"the {split} split has no images of {_count(missing)}: {listed(missing)}")
    return lines


def _count(classes: Collection[str]) -> str:
    return "1 class" if len(classes) == 1 else f"{len(classes):,} classes"
