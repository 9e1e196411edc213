"""Limits what Pillow would decode or parse beyond the size that an image declares.

A file of a kilobyte can declare 8x8 pixels and contain a TIFF tile of a gigabyte, a megabyte of text in each of many
PNG chunks, or thousands of JPEG scans, each of which goes over the whole image. These checks read the structure of a
file, but not its pixels, and refuse what would take more time or memory than the pixels and the bytes of the file do.
"""

import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import IO, Final, NamedTuple

from PIL.Image import Image

from cifarx_serve.errors import ImageError

MAX_SCANS: Final = 100
"""The maximum number of scans of a JPEG file. Encoders write about ten; libtiff has the same limit."""

MAX_COMPRESSED_CHUNKS: Final = 8
"""The maximum number of compressed texts and profiles in a PNG file. Pillow unpacks up to a megabyte of each."""

# Pillow takes microseconds for each chunk, segment or block, however few bytes it has.
_FREE_PARTS: Final = 1000
_BYTES_PER_PART: Final = 64
_MIN_CHECKED_BYTES: Final = 1 << 14
"""A smaller JPEG file has too few segments to take long, and counting them takes a tenth of the time to decode it."""

_REMEDY: Final = "save the image again in another program"


class TooManyPixels(ImageError):
    """Raised for an image with more pixels than the limit."""


def require_pixels(width: int, height: int, name: str, max_pixels: int, part: str = "") -> None:
    """Check the number of pixels of an image, or of a part of it.

    Raises:
        TooManyPixels: there are more than `max_pixels`.
    """
    if width * height > max_pixels:
        problem = f"{name} {part or 'is'} {width}x{height} pixels, over the limit of {max_pixels:,} pixels"
        raise TooManyPixels(problem, "resize the image first")


def require_small_structure(image_format: str, file: IO[bytes], name: str, max_pixels: int) -> None:
    """Check a file that Pillow is about to open. The position in the file changes.

    Args:
        image_format: the format of the file.
        file: the file, at its start; an `io.BytesIO` for every format but TIFF.
        name: what to call the file in an error message.
        max_pixels: the maximum number of pixels.

    Raises:
        TooManyPixels: the file contains tiles or a canvas with more pixels.
        ImageError: the file has too many parts, or its parts contradict each other.
    """
    if image_format == "TIFF":
        _TiffChecker(file, name, max_pixels).check()
    elif image_format in _CHECKS:
        assert isinstance(file, io.BytesIO)
        _CHECKS[image_format](file.getbuffer(), name, max_pixels)


def require_few_scans(image: Image, file: io.BytesIO, name: str) -> None:
    """Check a JPEG file that Pillow has just opened, so that the position in the file is after the first scan's header.

    A decoder goes over a whole image for each scan. It reads only one scan if that has all components and is not
    progressive.

    Raises:
        ImageError: the file has more than `MAX_SCANS` scans.
    """
    data, components = file.getbuffer(), len(image.getbands())
    header = bytes(data[file.tell() - 2 * components - 8 : file.tell()])
    if "progressive" not in image.info and header[:2] == _START_OF_SCAN and header[4] == components:
        return
    # A profile or a thumbnail can contain the bytes of the marker, so they are counted first because that is faster.
    if _exceeds(_SCAN.finditer(data), MAX_SCANS) and _exceeds((m for m in _markers(data) if m == _SOS), MAX_SCANS):
        raise _too_many(name, "JPEG scans", MAX_SCANS)


# JPEG: ITU-T T.81, annex B. Within the data of a scan, 0xFF is followed by 0 or by a restart marker.
_START_OF_SCAN: Final = b"\xff\xda"
_SCAN: Final = re.compile(re.escape(_START_OF_SCAN))
_MARKER: Final = re.compile(rb"\xff+([^\xff\x00])")
_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})


def _markers(data: memoryview) -> Iterator[int]:
    """Yield the markers of a JPEG file that a decoder sees, up to the end of the image."""
    position = 0
    while match := _MARKER.search(data, position):
        marker, position = match[1][0], match.end()
        yield marker
        if marker == _EOI:
            return
        if marker not in _WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")


def _exceeds(items: Iterator[object], limit: int) -> bool:
    """Return whether there are more items than the limit, without counting all of them."""
    return next(islice(items, limit, None), None) is not None


def _check_jpeg(data: memoryview, name: str, _max_pixels: int) -> None:
    if len(data) < _MIN_CHECKED_BYTES:
        return
    limit = _max_parts(data)
    for count, marker in enumerate(_markers(data)):
        if marker == _SOS:
            return
        if count >= limit:
            raise _too_many(name, "segments", limit)


_CHUNK: Final = struct.Struct(">I4s")
_COMPRESSED_CHUNKS: Final = frozenset({b"zTXt", b"iCCP"})
_MAX_KEYWORD: Final = 79


def _check_png(data: memoryview, name: str, _max_pixels: int) -> None:
    position, end, parts, compressed = 8, len(data) - 8, 0, 0
    while position <= end:
        length, kind = _CHUNK.unpack_from(data, position)
        if kind == b"IEND":
            break
        compressed += kind in _COMPRESSED_CHUNKS or (kind == b"iTXt" and _is_compressed_text(data, position + 8))
        position += 12 + length
        parts += 1
    if parts > _max_parts(data):
        raise _too_many(name, "PNG chunks", _max_parts(data))
    if compressed > MAX_COMPRESSED_CHUNKS:
        raise _too_many(name, "compressed PNG texts", MAX_COMPRESSED_CHUNKS)


def _is_compressed_text(data: memoryview, start: int) -> bool:
    """Return whether an iTXt chunk with its content at `start` is compressed: a flag follows the keyword and a zero."""
    keyword, _, rest = bytes(data[start : start + _MAX_KEYWORD + 2]).partition(b"\0")
    return not rest.startswith(b"\0") or len(keyword) > _MAX_KEYWORD


_EXTENSION, _FRAME, _TRAILER = ord("!"), ord(","), ord(";")


def _check_gif(data: memoryview, name: str, _max_pixels: int) -> None:
    """Count the blocks and the stray bytes before the first frame."""
    parts, limit, end = 0, _max_parts(data), len(data)
    flags = data[10] if end > 10 else 0
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while position < end and data[position] not in (_FRAME, _TRAILER):
        if data[position] == _EXTENSION:
            position += 2
            while position < end and data[position]:
                position += 1 + data[position]
                parts += 1
        position += 1
        parts += 1
        if parts > limit:
            raise _too_many(name, "GIF blocks before the first frame", limit)


def _check_webp(data: memoryview, name: str, max_pixels: int) -> None:
    """Check the canvas, for which memory is allocated when the file is opened (RFC 9649, section 2.7)."""
    if bytes(data[12:16]) == b"VP8X" and len(data) >= 30:
        width, height = (1 + int.from_bytes(data[start : start + 3], "little") for start in (24, 27))
        require_pixels(width, height, name, max_pixels)


_CHECKS: Final[dict[str, Callable[[memoryview, str, int], None]]] = {
    "JPEG": _check_jpeg,
    "PNG": _check_png,
    "GIF": _check_gif,
    "WEBP": _check_webp,
}


def _max_parts(data: memoryview) -> int:
    return _FREE_PARTS + len(data) // _BYTES_PER_PART


def _too_many(name: str, parts: str, limit: int) -> ImageError:
    return ImageError(f"{name} has more than {limit:,} {parts}", _REMEDY)


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
                        raise ImageError(f"{self._name} has the TIFF tag {tag.number} twice", _REMEDY)
                    structure[tag.number] = self._integer(tag)
        return structure

    def _tags(self, offset: int) -> Iterator[_Tag]:
        self._file.seek(offset)
        count = self._unpack("Q", self._file.read(8)) if self._is_big else self._unpack("H", self._file.read(2))
        if count > _MAX_TAGS:
            raise _too_many(self._name, "TIFF tags", _MAX_TAGS)
        entry = struct.Struct(self._order + ("HHQ8s" if self._is_big else "HHL4s"))
        data = self._file.read(count * entry.size)
        for start in range(0, len(data) - entry.size + 1, entry.size):
            yield _Tag(*entry.unpack_from(data, start))

    def _check_tag(self, tag: _Tag) -> None:
        size = tag.values * _TYPE_SIZES.get(tag.type, 0)
        if size > len(tag.content):
            self._bytes_left -= size
            if self._bytes_left < 0:
                raise ImageError(f"{self._name} has TIFF tags of more bytes than the file", _REMEDY)
        if tag.values > _MAX_VALUES and tag.type not in _BYTE_TYPES:
            raise _too_many(self._name, f"values of the TIFF tag {tag.number}", _MAX_VALUES)

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
            raise ImageError(f"{self._name} has a TIFF tag {tag.number} that is not one number", _REMEDY)
        return self._unpack(code, tag.content[: _TYPE_SIZES[tag.type]])

    def _unpack(self, code: str, data: bytes) -> int:
        value: int = struct.unpack(self._order + code, data)[0]
        return value
