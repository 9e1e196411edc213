"""Limits what Pillow would read and decode of a TIFF file: its tags, directories and tiles.

A tile can be much larger than the image, and a kilobyte can declare a gigabyte of tags.
"""

import os
import struct
from collections.abc import Iterator
from typing import IO, Final, NamedTuple

from cifarx_serve.errors import ImageError
from cifarx_serve.images.pixel_limits import SAVE_AGAIN, require_pixels, too_many_parts

# TIFF 6.0, section 2, and BigTIFF: the size of each type in bytes, and the code of each integer type.
_BYTE_TYPES: Final = frozenset({1, 2, 6, 7})
_TYPE_SIZES: Final = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_INTEGERS: Final = {1: "B", 3: "H", 4: "L", 8: "h", 9: "l", 13: "L", 16: "Q", 17: "q", 18: "Q"}
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
_STRUCTURE: Final = frozenset({_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT})
_DIRECTORIES: Final = frozenset({34665, 34853, 40965})
"""The tags that point to directories which Pillow also reads: EXIF, GPS and interoperability."""

_MAX_TAGS: Final = 1000
_MAX_VALUES: Final = 1 << 18
_MAX_DIRECTORIES: Final = 8


def require_small_tiff(file: IO[bytes], name: str, max_pixels: int) -> None:
    """Check the first image of a TIFF file that Pillow is about to open. The position in the file changes.

    Raises:
        TooManyPixels: the image, or all of its tiles together, have more than `max_pixels`.
        ImageError: there are too many tags or values, or tags contradict each other.
    """
    _TiffChecker(file, name, max_pixels).check()


class _Tag(NamedTuple):
    number: int
    type: int
    values: int
    content: bytes


class _TiffChecker:
    """Checks the first image of a TIFF file."""

    def __init__(self, file: IO[bytes], name: str, max_pixels: int) -> None:
        self._file = file
        self._name = name
        self._max_pixels = max_pixels
        self._bytes_left = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._head = file.read(16)
        self._order = "<" if self._head.startswith(b"II") else ">"
        self._is_big = b"+" in self._head[2:4]

    def check(self) -> None:
        try:
            first = self._unpack("Q" if self._is_big else "L", self._head[8:] if self._is_big else self._head[4:8])
            self._check_tiles(self._read_structure(first))
        except (struct.error, OverflowError, ValueError):
            return  # the file is truncated, which Pillow reports

    def _read_structure(self, first: int) -> dict[int, int]:
        """Return the tags in `_STRUCTURE` of the first directory, and check all directories that Pillow reads."""
        structure: dict[int, int] = {}
        pending, read = [first], 0
        while pending and read < _MAX_DIRECTORIES:
            offset, read = pending.pop(), read + 1
            for tag in self._tags(offset):
                self._check_tag(tag)
                if tag.number in _DIRECTORIES:
                    pending.append(self._integer(tag))
                elif tag.number in _STRUCTURE and offset == first:
                    if tag.number in structure:
                        raise ImageError(f"{self._name} has the TIFF tag {tag.number} twice", SAVE_AGAIN)
                    structure[tag.number] = self._integer(tag)
        return structure

    def _tags(self, offset: int) -> Iterator[_Tag]:
        self._file.seek(offset)
        count = self._unpack("Q", self._file.read(8)) if self._is_big else self._unpack("H", self._file.read(2))
        if count > _MAX_TAGS:
            raise too_many_parts(self._name, "TIFF tags", _MAX_TAGS)
        entry = struct.Struct(self._order + ("HHQ8s" if self._is_big else "HHL4s"))
        data = self._file.read(count * entry.size)
        for start in range(0, len(data) - entry.size + 1, entry.size):
            yield _Tag(*entry.unpack_from(data, start))

    def _check_tag(self, tag: _Tag) -> None:
        size = tag.values * _TYPE_SIZES.get(tag.type, 0)
        if size > len(tag.content):
            self._bytes_left -= size
            if self._bytes_left < 0:
                raise ImageError(f"{self._name} has TIFF tags of more bytes than the file", SAVE_AGAIN)
        if tag.values > _MAX_VALUES and tag.type not in _BYTE_TYPES:
            raise too_many_parts(self._name, f"values of the TIFF tag {tag.number}", _MAX_VALUES)

    def _check_tiles(self, structure: dict[int, int]) -> None:
        """Check the pixels of all tiles, which can be larger than the image. Strips are only decoded up to its size."""
        width, height = structure.get(_WIDTH, 0), structure.get(_HEIGHT, 0)
        require_pixels(width, height, self._name, self._max_pixels)
        tile_width, tile_height = structure.get(_TILE_WIDTH, 0), structure.get(_TILE_HEIGHT, 0)
        if tile_width > 0 and tile_height > 0:
            covered = -(-width // tile_width) * tile_width, -(-height // tile_height) * tile_height
            require_pixels(*covered, self._name, self._max_pixels, "has TIFF tiles of")

    def _integer(self, tag: _Tag) -> int:
        code = _INTEGERS.get(tag.type)
        if code is None or tag.values != 1:
            raise ImageError(f"{self._name} has a TIFF tag {tag.number} that is not one number", SAVE_AGAIN)
        return self._unpack(code, tag.content[: _TYPE_SIZES[tag.type]])

    def _unpack(self, code: str, data: bytes) -> int:
        value: int = struct.unpack(self._order + code, data)[0]
        return value
