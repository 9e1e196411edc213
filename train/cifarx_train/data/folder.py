"""Image files in a folder."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from cifarx_serve.errors import DataError, error_message
from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.inventory import Inventory
from cifarx_train.data.store import Arrange, ImageStore


class FolderStore(ImageStore):
    """The image files in a folder and its subfolders.

    Args:
        path: the folder.
        arrange: finds the splits and classes.
    """

    def __init__(self, path: Path, arrange: Arrange) -> None:
        super().__init__(path)
        self._arrange = arrange

    def catalog(self) -> Catalog:
        return self._arrange(take_inventory(self.path))

    def identity(self, split: Split, catalog: Callable[[], Catalog]) -> object:
        listed = catalog()
        paths = ((_stored_name(entry), entry.path) for entry in listed.splits[split])
        return (str(self.path.resolve()), listed.class_names, digest_of_files(self.path, paths))

    def read(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Path | bytes]]:
        for entry in entries:
            yield entry, self.path / entry.path


def take_inventory(folder: Path) -> Inventory:
    """Return the inventory of a folder and its subfolders.

    Raises:
        DataError: a folder cannot be listed.
    """
    inventory = Inventory(folder)
    for name in list_files(folder, inventory):
        inventory.add(name)
    return inventory


def list_files(folder: Path, inventory: Inventory) -> Iterator[str]:
    """Yield the paths of all files in a folder and its subfolders, with slashes and relative to it.

    Links are followed inside the folder. A link that leads out of it is left out, so that no file of this machine gets
    into a model because somebody put a link to it into a dataset.

    Args:
        folder: the folder.
        inventory: counts the links that are left out.

    Raises:
        DataError: a folder cannot be listed.
    """
    real = os.path.realpath(folder)
    try:
        yield from _walk(folder, "", (real,), _boundaries(Path(real)), inventory)
    except OSError as error:
        raise DataError(f"cannot list {error.filename} ({error_message(error)})", "make it readable") from error


def digest_of_files(folder: Path, files: Iterable[tuple[str, str]]) -> str:
    """Return a digest of the sizes and times of files, because reading their contents is as slow as decoding them.

    `st_ctime` is included because a copied file can have the modification time of the original.

    Args:
        folder: where the files are.
        files: a text for each file, and its path relative to the folder.
    """
    digest = hashlib.sha256()
    for text, path in files:
        try:
            status = (folder / path).stat()
        except OSError:
            digest.update(b"gone")  # decoding will report it as broken
        else:
            digest.update(f"({text}, {status.st_size}, {status.st_mtime_ns}, {status.st_ctime_ns})".encode())
    return digest.hexdigest()


def _stored_name(entry: Entry) -> str:
    """Return the text for a file in keys of the cache, which earlier versions made from a tuple of this name."""
    return f"ImageFile(class_name={entry.class_name!r}, name={entry.name!r})"


def _boundaries(folder: Path) -> tuple[str, ...]:
    """Return the folders that links may lead to.

    In the cache of Hugging Face's hub, the files of a snapshot are links to the folder `blobs` beside all snapshots.
    """
    blobs = (str(parent.parent / "blobs") for parent in folder.parents if parent.name == "snapshots")
    return str(folder), *blobs


def _walk(
    folder: Path, prefix: str, parents: tuple[str, ...], boundaries: tuple[str, ...], inventory: Inventory
) -> Iterator[str]:
    """Yield the paths of all files, with slashes and relative to the dataset.

    Args:
        folder: the folder to list.
        prefix: its path relative to the dataset, with a slash at its end.
        parents: the real paths of this folder and of all above it.
        boundaries: where links may lead.
        inventory: counts what is left out.
    """
    with os.scandir(folder) as entries:
        items = sorted(entries, key=lambda item: item.name)
    if prefix and not items:
        inventory.empty_folders.append(prefix.rstrip("/"))
    for item in items:
        name = f"{prefix}{item.name}"
        real = f"{parents[-1]}{os.sep}{item.name}"
        if item.is_symlink():
            real = os.path.realpath(item.path)
            if not any(real == boundary or real.startswith(boundary + os.sep) for boundary in boundaries):
                inventory.leave_out("behind links that lead out of it", name)
                continue
        if item.is_file():
            yield name
        elif not item.is_dir():
            inventory.leave_out("behind broken links" if item.is_symlink() else "that are no regular files", name)
        elif real in parents:
            inventory.leave_out("behind links to a folder that contains them", name)
        else:
            yield from _walk(Path(item.path), f"{name}/", (*parents, real), boundaries, inventory)
