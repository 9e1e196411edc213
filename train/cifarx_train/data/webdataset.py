"""Images in WebDataset shards: tar archives in which the files of a sample follow each other and share a name.

The files of a sample are an image and its label, such as `000001.jpg` and `000001.cls`, or `000001.json`. The shards
are read one after the other, and one sample at a time.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final

from cifarx_serve.images.suffixes import is_image
from cifarx_train.data.archives import ARCHIVE_SUFFIXES, Member, members
from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.folder import digest_of_files, take_inventory
from cifarx_train.data.inventory import Inventory
from cifarx_train.data.splits import Fraction, assign_splits_of_files, split_of_file
from cifarx_train.data.store import ImageStore, by_path

_TEXT_LABELS: Final = ("cls", "class", "label", "target")
_JSON_KEYS: Final = ("label", "cls", "class", "class_name", "label_name", "category", "target")
_MAX_LABEL: Final = 1 << 20  # bytes
_PEEKED: Final = 100  # members that tell a shard from other archives

SHARD_SUFFIXES: Final = tuple(suffix for suffix in ARCHIVE_SUFFIXES if suffix != ".zip")


class WebDatasetStore(ImageStore):
    """The images in the shards of a folder, or in one shard.

    Args:
        path: the folder or shard.
        fraction: the part of the images to hold out, if any.
    """

    def __init__(self, path: Path, fraction: Fraction | None) -> None:
        super().__init__(path)
        self._fraction = fraction
        self._root = path if path.is_dir() else path.parent

    def catalog(self) -> Catalog:
        inventory = self._inventory
        found: dict[Split | None, list[Entry]] = {}
        for shard in self._shards:
            split = split_of_file(shard) if self.path.is_dir() else None
            found.setdefault(split, []).extend(self._list_shard(shard))
        return assign_splits_of_files(found, self._fraction, inventory, "shards")

    def identity(self, split: Split, catalog: Callable[[], Catalog]) -> object:
        shards = sorted({entry.path.partition("#")[0] for entry in catalog().splits[split]})
        digest = digest_of_files(self._root, ((repr(shard), shard) for shard in shards))
        return ("webdataset", str(self.path.resolve()), catalog().class_names, digest)

    def read(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Path | bytes]]:
        wanted = by_path(entries)
        for shard in sorted({path.partition("#")[0] for path in wanted}):
            for member in members(self._root / shard):
                for entry in wanted.get(f"{shard}#{member.name}", ()):
                    yield entry, member.read()

    @cached_property
    def _inventory(self) -> Inventory:
        if self.path.is_dir():
            return take_inventory(self.path)
        inventory = Inventory(self.path)
        inventory.add(self.path.name)
        return inventory

    @cached_property
    def _shards(self) -> list[str]:
        shards = self._inventory.take(SHARD_SUFFIXES)
        return shards if self.path.is_dir() else [self.path.name]

    def _list_shard(self, shard: str) -> list[Entry]:
        images: dict[str, str] = {}
        labels: dict[str, str] = {}
        for member in members(self._root / shard):
            if member.name is None or member.is_link:
                self._inventory.leave_out("behind links", f"{shard}#{member.name}")
                continue
            key, extension = _split_name(member.name)
            if is_image(f"x.{extension}") and key not in images:
                images[key] = member.name
            elif (label := _read_label(member, extension)) is not None:
                labels.setdefault(key, label)
            else:
                self._inventory.leave_out("that are neither an image nor a label", f"{shard}#{member.name}")
        for key in images.keys() - labels.keys():
            self._inventory.leave_out("without a label", f"{shard}#{images[key]}")
        return [
            Entry(labels[key], f"{shard}#{key}", f"{shard}#{name}") for key, name in images.items() if key in labels
        ]


def is_webdataset(path: Path) -> bool:
    """Return whether an archive is a shard, by its first files: an image and a label that share a name.

    Raises:
        DataError: as for `archives.members`.
    """
    images: set[str] = set()
    labels: set[str] = set()
    for member in islice(members(path), _PEEKED):
        key, extension = _split_name(member.name or "")
        if is_image(f"x.{extension}"):
            images.add(key)
        # A JSON file beside an image in a class folder can be anything.
        elif extension in _TEXT_LABELS or (extension == "json" and "/" not in key):
            labels.add(key)
    return not images.isdisjoint(labels)


def _split_name(path: str) -> tuple[str, str]:
    """Return what the files of a sample share, and what tells them apart: all after the first dot of the file name."""
    folder, slash, file = path.rpartition("/")
    name, _, extension = file.partition(".")
    return f"{folder}{slash}{name}", extension.lower()


def _read_label(member: Member, extension: str) -> str | None:
    """Return the label of a sample, or None if a file has none."""
    if extension not in (*_TEXT_LABELS, "json") or member.size > _MAX_LABEL:
        return None
    text = member.read().decode(errors="replace").strip()
    if extension != "json":
        return text or None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _label_in(document) if isinstance(document, dict) else None


def _label_in(document: dict[str, Any]) -> str | None:
    values = (document[key] for key in _JSON_KEYS if key in document)
    return next((str(value) for value in values if isinstance(value, int | str)), None)
