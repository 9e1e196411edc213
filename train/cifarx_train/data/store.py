"""The interface of all places that image files are stored in: a folder, an archive, tables, shards."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.inventory import Inventory

Arrange: TypeAlias = Callable[[Inventory], Catalog]
"""Decides which files belong to which split and class."""


class ImageStore(ABC):
    """Image files of a dataset, each of them known by its `Entry.path`.

    Args:
        path: the folder or file that the user named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def catalog(self) -> Catalog:
        """Return the splits and classes of all images, without reading the images.

        Raises:
            DataError: the files cannot be listed, or there are no splits or classes.
        """

    @abstractmethod
    def identity(self, split: Split, catalog: Callable[[], Catalog]) -> object:
        """Return a value that changes whenever the names or images of a split change, for `decoded_cache.cache_key`.

        Args:
            split: the split.
            catalog: returns the catalog, which may take long.

        Raises:
            DataError: the files cannot be read.
        """

    @abstractmethod
    def read(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Path | bytes]]:
        """Yield these images with the path or the content of the file, in any order.

        Raises:
            DataError: an archive is damaged, or a file in it is too large for an image.
        """


def by_path(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return the images by their paths. Two images have the same path if one is a link to the other."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.path, []).append(entry)
    return found
