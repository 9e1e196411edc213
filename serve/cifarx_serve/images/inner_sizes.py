"""Limits what Pillow would decode or parse beyond the size that an image declares.

A file of a kilobyte can declare 8x8 pixels and contain a TIFF tile of a gigabyte, a megabyte of text in each of many
PNG chunks, or thousands of JPEG scans, each of which goes over the whole image. These checks read the structure of a
file, but not its pixels, and refuse what would take more time or memory than the pixels and the bytes of the file do.
"""

import io
import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import IO, Final

from PIL.Image import Image

from cifarx_serve.images.pixel_limits import require_pixels, too_many_parts

MAX_SCANS: Final = 100
"""The maximum number of scans of a JPEG file. Encoders write about ten; libtiff has the same limit."""

MAX_COMPRESSED_CHUNKS: Final = 8
"""The maximum number of compressed texts and profiles in a PNG file. Pillow unpacks up to a megabyte of each."""

# Pillow takes microseconds for each chunk, segment or block, however few bytes it has.
_FREE_PARTS: Final = 1000
_BYTES_PER_PART: Final = 64
_MIN_CHECKED_BYTES: Final = 1 << 14
"""A smaller JPEG file has too few segments to take long, and counting them takes a tenth of the time to decode it."""


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
        from cifarx_serve.images.tiff_structure import require_small_tiff  # few images are in this format

        require_small_tiff(file, name, max_pixels)
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
    if _exceeds(re.finditer(_START_OF_SCAN, data), MAX_SCANS) and _exceeds(
        (m for m in _markers(data) if m == _SOS), MAX_SCANS
    ):
        raise too_many_parts(name, "JPEG scans", MAX_SCANS)


# JPEG: ITU-T T.81, annex B. Within the data of a scan, 0xFF is followed by 0 or by a restart marker.
_START_OF_SCAN: Final = b"\xff\xda"
_MARKER: Final = rb"\xff+([^\xff\x00])"  # compiled when it is used, because every start of the program costs time
_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})


def _markers(data: memoryview) -> Iterator[int]:
    """Yield the markers of a JPEG file that a decoder sees, up to the end of the image."""
    position = 0
    marker_pattern = re.compile(_MARKER)
    while match := marker_pattern.search(data, position):
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
            raise too_many_parts(name, "segments", limit)


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
        raise too_many_parts(name, "PNG chunks", _max_parts(data))
    if compressed > MAX_COMPRESSED_CHUNKS:
        raise too_many_parts(name, "compressed PNG texts", MAX_COMPRESSED_CHUNKS)


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
            raise too_many_parts(name, "GIF blocks before the first frame", limit)


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
