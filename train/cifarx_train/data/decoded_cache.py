"""Splits that were decoded once, kept on the disk and mapped into memory from there.

An entry is two files named by a key: `<key>.npy`, the images as uint8 (N, height, width, 3), and `<key>.record`, what
else is known of them. The record is written last, and an entry without one does not exist. Processes that make the
same entry at once both end well: each renames whole files to the same names, and their contents are equal.
"""

import errno
import hashlib
import io
import math
import os
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final, TypeAlias

import msgspec
import numpy as np
import PIL
from numpy.typing import NDArray

from cifarx_serve.errors import FallbackWarning, OutputError
from cifarx_serve.files.atomic import atomic_path, cannot_write
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages

# Raised whenever the same files give other pixels, labels or records than before: `read_image` and `resize` count too.
_FORMAT: Final = 1

_FEWEST_IMAGES: Final = 1000  # fewer are decoded in less time than it takes to look after their files
_UNUSED_S: Final = 30 * 24 * 3600.0
_RECENT_S: Final = 24 * 3600.0
_MOST_BYTES: Final = 50 * 10**9


class BrokenImage(msgspec.Struct, frozen=True):
    """A file that is no image: its name below the data set's folder, and what is wrong with it."""

    file: str
    reason: str


class Decoded(msgspec.Struct, frozen=True):
    """What decoding told besides the pixels.

    `labels` has one number for every image; `broken` are the files that were left out of the images and the labels.
    """

    class_names: tuple[str, ...]
    labels: list[int]
    broken: list[BrokenImage] = []


class Pixels(ABC):
    """Where images of one size go while they are decoded, by several threads and in any order."""

    @abstractmethod
    def write(self, position: int, image: NDArray[np.uint8]) -> None:
        """Put down one image, uint8 (height, width, 3)."""

    @abstractmethod
    def read(self, position: int) -> NDArray[np.uint8]:
        """One image that was put down."""

    def close_gaps(self, missing: set[int], count: int) -> None:
        """Move the images among the first `count` together where there is none at `missing` positions."""
        kept = (position for position in range(count) if position not in missing)
        for target, position in enumerate(kept):
            if target != position:
                self.write(target, self.read(position))


Fill: TypeAlias = Callable[[Pixels], Decoded]
"""Puts down the images, without gaps from the first on, and tells about them; it may be called a second time."""


def cache_key(origin: object, spec: InputSpec) -> str:
    """The name of an entry: changes with everything that decides pixels or labels.

    Args:
        origin: tells the files apart from all others, down to their contents; plain types with a faithful `repr`.
        spec: its size and filter count, not its scaling.
    """
    known = (_FORMAT, PIL.__version__, spec.height, spec.width, spec.resize, origin)
    return hashlib.sha256(repr(known).encode()).hexdigest()


def find(key: str, spec: InputSpec) -> tuple[LabeledImages, Decoded] | None:
    """A split that was kept, its images mapped read-only, or None where there is none or it is damaged."""
    try:
        folder = _folder()
        record = folder / f"{key}.record"
        known = _unseal(record.read_bytes())
        images = _map(folder / f"{key}.npy", (len(known.labels), spec.height, spec.width, 3))
        with suppress(OSError):  # a folder that may only be read is good enough
            os.utime(record)  # used now
    except (OSError, ValueError, OutputError):
        return None
    return LabeledImages(images, np.array(known.labels, np.int64), folder / f"{key}.npy"), known


def decode(key: str, count: int, spec: InputSpec, fill: Fill) -> tuple[LabeledImages, Decoded]:
    """Decode a split of up to `count` images straight into a new entry, or into memory if that cannot be.

    What keeps an entry from being made - no space, no right to write - is told in a FallbackWarning. Small splits go
    into memory without a word. What `fill` raises goes through, and nothing is kept then.
    """
    if count >= _FEWEST_IMAGES:
        try:
            _make(key, count, spec, fill)
            if kept := find(key, spec):
                return kept
            reason = "what was written could not be read back"
        except OutputError as error:
            reason = error.problem
        warnings.warn(
            f"decoded images are not kept for the next start, which will decode them again: {reason}; "
            "XDG_CACHE_HOME may name another place",
            FallbackWarning,
            stacklevel=2,
        )
    memory = _InMemory((count, spec.height, spec.width, 3))
    known = fill(memory)
    return LabeledImages(memory.images[: len(known.labels)], np.array(known.labels, np.int64)), known


def _make(key: str, count: int, spec: InputSpec, fill: Fill) -> None:
    """Write an entry.

    Raises:
        OutputError: the folder cannot be written, or has too little space.
    """
    folder = _folder()
    shape = (count, spec.height, spec.width, 3)
    with atomic_path(folder / f"{key}.npy") as path:
        _require_space(folder, shape)
        with path.open("r+b") as file:
            pixels = _InFile(file, shape)
            known = fill(pixels)
            pixels.finish(len(known.labels))
    with atomic_path(folder / f"{key}.record") as path:
        path.write_bytes(_seal(known))
    _clean(folder)


def _folder() -> Path:
    """The folder of all entries, by the XDG base directory specification: what is no absolute path there is ignored."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:  # a user without a home
        raise cannot_write(Path("~/.cache"), OSError(errno.ENOENT, str(error))) from error
    return base / "cifarx" / "decoded"


def _require_space(folder: Path, shape: tuple[int, int, int, int]) -> None:
    """Never take more than half of what is free: the disk is the user's, and other programs need some of it."""
    wanted, free = math.prod(shape), shutil.disk_usage(folder).free
    if 2 * wanted > free:
        raise OSError(errno.ENOSPC, f"{wanted / 1e9:.1f} GB is more than half of the {free / 1e9:.1f} GB that are free")


def _seal(known: Decoded) -> bytes:
    content = msgspec.json.encode(known)
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def _unseal(sealed: bytes) -> Decoded:
    """Raises ValueError for bytes that are not as they were written."""
    digest, _, content = sealed.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("the record is damaged")
    return msgspec.json.decode(content, type=Decoded)  # its errors are ValueErrors


def _map(path: Path, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Images of a known shape, mapped read-only; raises ValueError for a file that cannot hold exactly these."""
    header = _header(shape)
    with path.open("rb") as file:
        # Compared, not parsed: there is one right header and one right length.
        whole = file.read(len(header)) == header and file.seek(0, io.SEEK_END) == len(header) + math.prod(shape)
    if not whole:
        raise ValueError("the images are damaged")
    mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)


def _header(shape: tuple[int, int, int, int]) -> bytes:
    """The head of an `.npy` file, as long for any number of images of one size."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class _InMemory(Pixels):
    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.images = np.empty(shape, np.uint8)

    def write(self, position: int, image: NDArray[np.uint8]) -> None:
        self.images[position] = image

    def read(self, position: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.images[position]
        return image


class _InFile(Pixels):
    """An `.npy` file, written image by image: on a full disk a write is an error, and a mapped page a dead process."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int, int]) -> None:
        self._file = file
        self._image_shape = shape[1:]
        self._size = math.prod(shape[1:])
        self._start = len(_header(shape))
        self._lock = Lock()

    def write(self, position: int, image: NDArray[np.uint8]) -> None:
        with self._lock:
            self._file.seek(self._start + position * self._size)
            self._file.write(np.ascontiguousarray(image).data)

    def read(self, position: int) -> NDArray[np.uint8]:
        with self._lock:
            self._file.seek(self._start + position * self._size)
            return np.frombuffer(self._file.read(self._size), np.uint8).reshape(self._image_shape)

    def finish(self, count: int) -> None:
        """End the file after `count` images."""
        self._file.truncate(self._start + count * self._size)
        self._file.seek(0)
        self._file.write(_header((count, *self._image_shape)))


def _clean(folder: Path) -> None:
    """Remove what was not used for 30 days, what killed processes left, and the longest unused beyond 50 GB.

    What was used within a day stays however large it is: a run may be about to use it again.
    """
    now, total = time.time(), 0
    with suppress(OSError):  # another process may be cleaning too
        files = {path: path.stat() for path in folder.iterdir()}
        used = {path.stem: status.st_mtime for path, status in files.items() if path.suffix == ".record"}
        ages = {path: now - used.get(path.stem, status.st_mtime) for path, status in files.items()}
        for path in sorted(files, key=ages.__getitem__):
            total += files[path].st_size
            # Without a record it is half an entry, or a temporary file, and a day is long for either.
            limit = _UNUSED_S if path.stem in used and total <= _MOST_BYTES else _RECENT_S
            if ages[path] > limit:
                path.unlink(missing_ok=True)
