"""A cache of decoded splits on disk, whose images are memory-mapped.

An entry is a pair of files named after a key: `<key>.npy` contains the images, uint8 (N, height, width, channels), and
`<key>.record` the labels, the class names and a checksum of everything. The record is written last: images without a
record are not an entry. Several processes can write the same entry at once, because each renames complete files with
equal contents to the same names. Files of another user are not used.
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
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final, TypeAlias

import msgspec
import numpy as np
import PIL
from numpy.typing import NDArray

from cifarx_serve.errors import FallbackWarning, OutputError, error_message
from cifarx_serve.files.atomic import atomic_path, write_error
from cifarx_serve.files.cache_directory import cache_directory, create_cache_directory, require_own
from cifarx_serve.images.preprocess import rgb_fill
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import KnownFingerprint, LabeledImages, Split, fingerprint

_NAME: Final = "decoded"

# Increase this whenever the same files result in different pixels, labels or records than before, including after a
# change to `read_image` or `resize`.
_FORMAT: Final = 2

_MIN_IMAGES: Final = 1000  # decoding fewer images takes less time than managing an entry
_MAX_UNUSED_S: Final = 30 * 24 * 3600.0
_RECENT_S: Final = 24 * 3600.0
_MAX_BYTES: Final = 50 * 10**9


class BrokenImage(msgspec.Struct, frozen=True):
    """A file that cannot be read as an image.

    Attributes:
        file: its path relative to the dataset's folder.
        reason: what is wrong with it.
    """

    file: str
    reason: str


class DecodedSplit(msgspec.Struct, frozen=True):
    """Everything about a decoded split except its pixels. The JSON of this is stored in the record.

    Attributes:
        class_names: in label order.
        labels: one per image.
        broken: the files that are not among the images and labels.
        fingerprint: the fingerprint of the split, in a record.
        splits: the splits of the dataset; none in records of earlier versions.
        left_out: what of the dataset is not used, as in `Dataset.left_out`.
    """

    class_names: tuple[str, ...]
    labels: list[int]
    broken: list[BrokenImage] = []
    fingerprint: str = ""
    splits: tuple[Split, ...] = ()
    left_out: tuple[str, ...] = ()


class ImageBuffer(ABC):
    """Storage for the images of a split while it is decoded. Threads can write to it in any order."""

    @abstractmethod
    def write(self, position: int, image: NDArray[np.uint8]) -> None:
        """Store an image, uint8 (height, width, channels)."""

    @abstractmethod
    def read(self, position: int) -> NDArray[np.uint8]:
        """Return a stored image, uint8 (height, width, channels)."""

    def close_gaps(self, missing: set[int], count: int) -> None:
        """Move images to lower positions, so that no position is empty.

        Args:
            missing: the positions without an image.
            count: the number of positions, including the missing ones.
        """
        kept = (position for position in range(count) if position not in missing)
        for target, position in enumerate(kept):
            if target != position:
                self.write(target, self.read(position))


DecodeFunction: TypeAlias = Callable[[ImageBuffer], DecodedSplit]
"""Stores the images at positions 0, 1, 2, … and returns the rest. It can be called twice."""


def cache_key(origin: object, spec: InputSpec) -> str:
    """Return the key of an entry, which depends on everything that determines pixels or labels.

    Args:
        origin: identifies the source files and their contents. Its `repr` must be the same in every process.
        spec: its size and how images are resized matter; what happens to the pixels afterwards does not.
    """
    size = (spec.height, spec.width, spec.channels)
    resizing = (spec.resize, spec.resize_to, spec.crop_offset, spec.interpolation, spec.antialias)
    fill = rgb_fill(spec).tolist()
    inputs = (_FORMAT, PIL.__version__, size, resizing, fill, origin)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


def find(key: str, spec: InputSpec) -> tuple[LabeledImages, DecodedSplit] | None:
    """Return an entry, with its images memory-mapped read-only, or None if it does not exist or is damaged.

    All of the images are read, because a changed pixel would go unnoticed otherwise. Training reads them anyway for the
    fingerprint, which is not computed again.
    """
    try:
        entry = _read_entry(key, spec)
    except (OSError, ValueError):
        return None
    images, decoded = entry
    unverified = replace(images, known_fingerprint=None)
    return entry if fingerprint(unverified, decoded.class_names) == decoded.fingerprint else None


def _read_entry(key: str, spec: InputSpec) -> tuple[LabeledImages, DecodedSplit]:
    """Return an entry without verifying its images. Raise an OSError or a ValueError if it is missing or damaged."""
    folder = cache_directory(_NAME)
    record, file = folder / f"{key}.record", folder / f"{key}.npy"
    for path in (folder.parent, folder, record, file):
        require_own(path)
    decoded = _decode_record(record.read_bytes())
    images = _map(file, (len(decoded.labels), spec.height, spec.width, spec.channels))
    with suppress(OSError):  # a read-only folder is sufficient
        os.utime(record)  # the time of the last use
    known = KnownFingerprint(decoded.class_names, decoded.fingerprint)
    return LabeledImages(images, np.array(decoded.labels, np.int64), file, known), decoded


def decode(key: str, count: int, spec: InputSpec, function: DecodeFunction) -> tuple[LabeledImages, DecodedSplit]:
    """Decode a split of up to `count` images into a new entry, or into memory if no entry can be written.

    A FallbackWarning gives the reason why no entry was written, such as a full disk or missing permissions. Small
    splits are always decoded into memory, without a warning. If `function` raises an exception, nothing is cached.
    """
    if count >= _MIN_IMAGES:
        try:
            _write_entry(key, count, spec, function)
            return _read_entry(key, spec)
        except OutputError as error:
            reason = error.problem
        except (OSError, ValueError) as error:
            reason = f"the written files cannot be read ({error_message(error)})"
        warnings.warn(
            f"decoded images are not cached, so the next run will decode them again: {reason}; "
            "set XDG_CACHE_HOME to use another folder",
            FallbackWarning,
            stacklevel=2,
        )
    buffer = _MemoryBuffer((count, spec.height, spec.width, spec.channels))
    decoded = function(buffer)
    return LabeledImages(buffer.images[: len(decoded.labels)], np.array(decoded.labels, np.int64)), decoded


def _write_entry(key: str, count: int, spec: InputSpec, function: DecodeFunction) -> None:
    """Decode a split into a new entry.

    Raises:
        OutputError: the folder is not writable, does not have enough space, or belongs to another user.
    """
    try:
        folder = create_cache_directory(_NAME)
    except OSError as error:
        raise write_error(Path(error.filename or _NAME), error) from error
    shape = (count, spec.height, spec.width, spec.channels)
    with atomic_path(folder / f"{key}.npy") as path:
        _require_space(folder, shape)
        with path.open("r+b") as file:
            buffer = _NpyFileBuffer(file, shape)
            decoded = function(buffer)
            buffer.finish(len(decoded.labels))
        images = _map(path, (len(decoded.labels), *shape[1:]))
        split = LabeledImages(images, np.array(decoded.labels, np.int64))
        decoded = msgspec.structs.replace(decoded, fingerprint=fingerprint(split, decoded.class_names))
    with atomic_path(folder / f"{key}.record") as path:
        path.write_bytes(_encode_record(decoded))
    _remove_old_entries(folder)


def _require_space(folder: Path, shape: tuple[int, int, int, int]) -> None:
    """Raise an OSError if an entry would use more than half of the free space, which other programs need too."""
    needed, free = math.prod(shape), shutil.disk_usage(folder).free
    if 2 * needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB is more than half of the {free / 1e9:.1f} GB that are free")


def _encode_record(decoded: DecodedSplit) -> bytes:
    """Return the content of a record: the SHA-256 of the JSON, a line feed, and the JSON."""
    content = msgspec.json.encode(decoded)
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def _decode_record(record: bytes) -> DecodedSplit:
    """Raise a ValueError if the record is damaged."""
    digest, _, content = record.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("the record is damaged")
    return msgspec.json.decode(content, type=DecodedSplit)  # its errors are ValueErrors


def _map(path: Path, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Map images read-only. Raise a ValueError if the file does not have the header and size of this shape."""
    header = _header(shape)
    with path.open("rb") as file:
        # There is only one valid header and size, so there is no need to parse the header.
        valid = file.read(len(header)) == header and file.seek(0, io.SEEK_END) == len(header) + math.prod(shape)
    if not valid:
        raise ValueError("the images are damaged")
    mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)


def _header(shape: tuple[int, int, int, int]) -> bytes:
    """Return the header of an `.npy` file. Its length does not depend on the number of images."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class _MemoryBuffer(ImageBuffer):
    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.images = np.empty(shape, np.uint8)

    def write(self, position: int, image: NDArray[np.uint8]) -> None:
        self.images[position] = image

    def read(self, position: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.images[position]
        return image


class _NpyFileBuffer(ImageBuffer):
    """An `.npy` file.

    Images are written instead of copied into a memory map: if the disk is full, a write raises an error, whereas
    access to a mapped page kills the process.
    """

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
        """Truncate the file after `count` images and write its header."""
        self._file.truncate(self._start + count * self._size)
        self._file.seek(0)
        self._file.write(_header((count, *self._image_shape)))


def _remove_old_entries(folder: Path) -> None:
    """Remove entries unused for 30 days, the least recently used ones beyond 50 GB, and files of killed processes.

    Anything used within the last day is kept regardless of its size, because a run may still need it.
    """
    now, total = time.time(), 0
    with suppress(OSError):  # another process may be removing entries at the same time
        files = {path: path.stat() for path in folder.iterdir()}
        used = {path.stem: status.st_mtime for path, status in files.items() if path.suffix == ".record"}
        ages = {path: now - used.get(path.stem, status.st_mtime) for path, status in files.items()}
        for path in sorted(files, key=ages.__getitem__):
            total += files[path].st_size
            # A file without a record is an incomplete entry or a temporary file, neither of which lasts a day.
            limit = _MAX_UNUSED_S if path.stem in used and total <= _MAX_BYTES else _RECENT_S
            if ages[path] > limit:
                path.unlink(missing_ok=True)
