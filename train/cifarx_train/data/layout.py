"""Finds splits and classes by the names of folders, as torchvision's `ImageFolder` finds classes."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.inventory import HIDDEN, Inventory, listed
from cifarx_train.data.splits import SPLIT_NAMES, Fraction, assign_splits, split_of

_MIN_CLASSES: Final = 2


def arrange_folders(inventory: Inventory, fraction: Fraction | None) -> Catalog:
    """Return the catalog of images in `<split>/<class>/…/<image>`, or in `<class>/…/<image>` if there are no splits.

    All of it can be in one parent folder, as in most archives. The class of an image is the first folder below that of
    the split, in whatever subfolder of it the image is. Classes and images are sorted by name, and the images in the
    subfolders of a class follow those in the class folder itself.

    Args:
        inventory: of the dataset.
        fraction: the part of the images to hold out, if any.

    Raises:
        DataError, UsageError: as for `splits.assign_splits`; or there are several datasets in the folder.
    """
    top = _by_folder(inventory.images)
    parent, groups = _find_parent(top, inventory)
    for folder, names in top.items():
        if parent and folder != parent:
            inventory.leave_out(f"outside {parent}/", f"{folder}/" if folder else names[0], len(names))
    folders = _split_folders(groups)
    prefix = f"{parent}/" if parent else ""
    used = [folder for names in folders.values() for folder in names] or _class_folders(groups)
    for folder, names in groups.items():
        if folder not in used:
            inventory.leave_out("outside the folders of splits and classes", folder or names[0], len(names))
    _note_empty_classes([f"{prefix}{folder}/" for folder in (used if folders else ())] or [prefix], inventory)
    if not folders:
        return assign_splits({}, _entries(prefix, {folder: groups[folder] for folder in used}), fraction, inventory)
    found: dict[Split, list[Entry]] = {}
    for split, names in folders.items():
        folder, *others = names
        for other in others:
            inventory.leave_out(f"in another folder for the {split} split", f"{other}/", len(groups[other]))
        classes = _by_folder(groups[folder])
        if outside := classes.pop("", []):
            inventory.leave_out("outside class folders", f"{folder}/{outside[0]}", len(outside))
        found[split] = _entries(f"{prefix}{folder}/", classes)
    return assign_splits(found, (), fraction, inventory)


def _note_empty_classes(parents: list[str], inventory: Inventory) -> None:
    """Count the class folders in these folders that are empty or have other files alone, and images in none of them."""
    files = [*inventory.others, *(f"{folder}/" for folder in inventory.empty_folders)]
    known = {name for parent in parents for name in _folders_in(parent, inventory.images)}
    for parent in parents:
        for name in sorted(_folders_in(parent, files) - known):
            if not name.startswith(HIDDEN):
                inventory.leave_out("without images", f"{parent}{name}", unit="folders")


def _folders_in(parent: str, paths: Iterable[str]) -> set[str]:
    return _by_folder(path.removeprefix(parent) for path in paths if path.startswith(parent)).keys() - {""}


def _by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the paths below each folder, without it; the files that are in no folder have the key ""."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        folder, slash, rest = path.partition("/")
        groups[folder if slash else ""].append(rest if slash else path)
    return dict(groups)


def _find_parent(top: dict[str, list[str]], inventory: Inventory) -> tuple[str, dict[str, list[str]]]:
    """Return the folder in which the splits or classes are, "" for the dataset's own, and the paths below each."""
    if "train" in _split_folders(top):
        return "", top
    below = {folder: _by_folder(names) for folder, names in top.items() if folder}
    datasets = [folder for folder, groups in below.items() if "train" in _split_folders(groups)]
    if len(datasets) > 1:
        remedy = f"give one of them: --data {inventory.path / datasets[0]}"
        raise inventory.error(f"has {len(datasets)} datasets ({listed(datasets)})", remedy)
    if not datasets and len(below) == 1 and not _split_folders(top):
        datasets = [folder for folder, groups in below.items() if len(_class_folders(groups)) >= _MIN_CLASSES]
    return (datasets[0], below[datasets[0]]) if datasets else ("", top)


def _split_folders(groups: dict[str, list[str]]) -> dict[Split, list[str]]:
    """Return the folders of each split that have class folders, the most usual name first."""
    found: defaultdict[Split, list[str]] = defaultdict(list)
    for folder in sorted(groups, key=_usual_name_first):
        if (split := split_of(folder)) and any("/" in name for name in groups[folder]):
            found[split].append(folder)
    return dict(found)


def _usual_name_first(folder: str) -> tuple[int, bool, str]:
    split = split_of(folder)
    rank = SPLIT_NAMES[split].index(folder.lower()) if split else -1
    return rank, folder != folder.lower(), folder


def _class_folders(groups: dict[str, list[str]]) -> list[str]:
    """Return the class folders of a dataset without splits. Images in a folder such as `test` are not labeled."""
    return [folder for folder in groups if folder and split_of(folder) in (None, "train")]


def _entries(prefix: str, classes: dict[str, list[str]]) -> list[Entry]:
    """Return the images in class folders, in the order of torchvision's `ImageFolder`."""
    entries = [Entry(name, file, f"{prefix}{name}/{file}") for name, files in classes.items() for file in files]
    return sorted(entries, key=_order)


def _order(entry: Entry) -> tuple[str, str, str]:
    folder, _, name = entry.name.rpartition("/")
    return entry.class_name, folder, name
