"""Image files in a zip or tar archive, compressed or not. Nothing is extracted to disk."""

import hashlib
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from cifarx_serve.errors import DataError, error_message
from cifarx_serve.files.regular_file import require_regular_file
from cifarx_serve.images.reader import MAX_BYTES
from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.inventory import Inventory
from cifarx_train.data.links import linked_files, normalize, symlink_target
from cifarx_train.data.store import Arrange, ImageStore, by_path

_READ_SIZE: Final = 1 << 20  # bytes
_MAX_LINK: Final = 4096  # bytes of a link in a zip archive
_ZIP: Final = (b"PK\x03\x04", b"PK\x05\x06")
_ZSTD: Final = b"\x28\xb5\x2f\xfd"

ARCHIVE_SUFFIXES: Final = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Member(NamedTuple):
    """A file or a link in an archive.

    Attributes:
        name: its path in the archive, or None if that leads out of it.
        size: of the file in bytes.
        is_link: whether it is a link.
        target: the path in the archive that a link leads to, or None if it leads out of it.
        read: returns the content. It must be called before the next member is read.
    """

    name: str | None
    size: int
    is_link: bool
    target: str | None
    read: Callable[[], bytes]


class ArchiveStore(ImageStore):
    """The image files in an archive.

    Args:
        path: the archive.
        arrange: finds the splits and classes.
    """

    def __init__(self, path: Path, arrange: Arrange) -> None:
        super().__init__(path)
        self._arrange = arrange
        self._inventory = Inventory(path)

    def catalog(self) -> Catalog:
        inventory = self._inventory
        for name in self._positions:
            inventory.add(name)
        return self._arrange(inventory)

    def identity(self, split: Split, catalog: Callable[[], Catalog]) -> object:  # noqa: ARG002 - it contains all splits
        """Return the SHA-256 of the archive. This takes about 1% of the time to decode its images."""
        return file_sha256(self.path)

    def read(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Path | bytes]]:
        wanted: dict[int, list[Entry]] = {}
        for path, images in by_path(entries).items():
            wanted.setdefault(self._positions[path], []).extend(images)
        for position, member in enumerate(members(self.path)):
            if images_of_member := wanted.get(position):
                content = member.read()
                for entry in images_of_member:
                    yield entry, content

    @cached_property
    def _positions(self) -> dict[str, int]:
        """The position of the member with the content of each file. The later of two files with one name is used."""
        positions: dict[str, int] = {}
        links: dict[str, str | None] = {}
        for position, member in enumerate(members(self.path)):
            if member.name is None:
                self._inventory.leave_out("with paths that lead out of it", "..")
            elif member.is_link:
                positions.pop(member.name, None)
                links[member.name] = member.target
            else:
                links.pop(member.name, None)
                positions[member.name] = position
        linked = list(linked_files(set(positions), links, self._inventory))
        return positions | {name: positions[target] for name, target in linked}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error_message(error)})", "make it readable") from error


def require_archive(path: Path, remedy: str) -> None:
    """Check that a file is an archive by reading its beginning.

    Raises:
        DataError: it is not. The message ends with the remedy.
    """
    try:
        require_regular_file(path)
        with _open(path) as archive:
            next(iter(archive), None)
    except _damage() as error:
        reason = error_message(error).rstrip(":")  # the following lines list every compression that tarfile tried
        raise DataError(f"{path} is not a folder or a .zip or .tar.gz of one ({reason})", remedy) from error


def members(path: Path) -> Iterator[Member]:
    """Yield every file and link of an archive, and read the archive to its end.

    Raises:
        DataError: the archive is truncated, damaged or encrypted, or a file in it is too large for an image.
    """
    try:
        with _open(path) as archive:
            yield from archive
    except _damage() as error:
        raise _damaged(path, error) from error


@contextmanager
def _open(path: Path) -> Iterator[Iterator[Member]]:
    with path.open("rb") as file:
        head = file.read(len(_ZSTD))
    if head in _ZIP:
        with zipfile.ZipFile(path) as archive:
            yield _zip_members(path, archive)
    elif head == _ZSTD:
        with _import_zstd(path).open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            yield _tar_members(path, archive)
    else:
        with tarfile.open(path) as archive:
            yield _tar_members(path, archive)


def _tar_members(path: Path, archive: tarfile.TarFile) -> Iterator[Member]:
    while info := archive.next():
        archive.members.clear()  # type: ignore[attr-defined] # a TarFile keeps every member, possibly millions
        name = normalize(info.name)
        target = None
        if info.issym():
            target = symlink_target(name or "", info.linkname)
        elif info.islnk():
            target = normalize(info.linkname)
        elif not info.isfile():
            continue

        def read(info: tarfile.TarInfo = info) -> bytes:
            return _read(path, info.name, info.size, lambda: archive.extractfile(info))

        yield Member(name, info.size, info.issym() or info.islnk(), target, read)
    while archive.fileobj and archive.fileobj.read(_READ_SIZE):
        pass  # gzip checks its checksum at the end of the file


def _zip_members(path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        if info.is_dir():
            continue
        name = normalize(info.filename)
        is_link = stat.S_ISLNK(info.external_attr >> 16) and info.file_size <= _MAX_LINK
        target = symlink_target(name or "", archive.read(info).decode(errors="surrogateescape")) if is_link else None

        def read(info: zipfile.ZipInfo = info) -> bytes:
            return _read(path, info.filename, info.file_size, lambda: archive.open(info))

        yield Member(name, info.file_size, is_link, target, read)


def _read(path: Path, name: str, size: int, open_file: Callable[[], IO[bytes] | None]) -> bytes:
    if size > MAX_BYTES:  # a sparse member takes no space in the archive
        raise DataError(f"{name} in {path} has {size:,} bytes, too many for an image", "remove it")
    try:
        file = open_file()
        return file.read() if file else b""
    except _damage() as error:
        raise _damaged(path, error) from error


def _damage() -> tuple[type[Exception], ...]:
    """Return the exceptions that the readers and decompressors raise for files that are truncated or damaged.

    zipfile raises a RuntimeError for an encrypted file and a NotImplementedError for a compression that it lacks.
    """
    errors = (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError)
    zstd = _find_zstd()
    return (*errors, zstd.ZstdError) if zstd else errors


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, RuntimeError):
        reason = "it is encrypted" if "encrypted" in str(error) else error_message(error)
        return DataError(f"{path} cannot be read ({reason})", "extract it, and give the folder")
    return DataError(f"{path} is truncated or damaged ({error})", "copy or download it again")


def _find_zstd() -> Any | None:
    for name in ("compression.zstd", "backports.zstd"):  # the first is in Python since 3.14
        with suppress(ModuleNotFoundError):
            return import_module(name)
    return None


def _import_zstd(path: Path) -> Any:
    if module := _find_zstd():
        return module
    raise DataError(f"{path} is compressed with Zstandard, which this Python does not read", "install 'cifarx[zstd]'")
