"""Finds the orientation of a camera in the metadata of an image file (Exif 2.3, section 4.6.4).

Pillow's `getexif` reads every tag, of which a file can contain any number with any amount of data.
"""

import re
import struct
from collections.abc import Mapping
from typing import Any, Final

_TAG: Final = 0x0112
_MAX_TAGS: Final = 1000

_EXIF_HEADER: Final = re.compile(rb"(Exif\0\0){0,2}")
_XMP_TAG: Final = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')

# The codes of the types that the tag has in practice: BYTE, SHORT and LONG.
_CODES: Final = {1: "B", 3: "H", 4: "L"}


def stored_orientation(info: Mapping[Any, Any]) -> int | None:
    """Return the orientation, normally 1 to 8, or None if the metadata contain none or are damaged.

    Args:
        info: `Image.info` of Pillow, with the EXIF data or the XMP packet of the file.

    Raises:
        ValueError: the EXIF data are in a text chunk and are not hexadecimal.
    """
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:  # as ImageMagick writes it into PNG files
        exif = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
    orientation = _exif_orientation(exif) if exif else None
    return _xmp_orientation(info) if orientation is None else orientation


def _exif_orientation(data: bytes) -> int | None:
    """Read the tag in the first directory of a TIFF structure."""
    header = _EXIF_HEADER.match(data)
    assert header, "the pattern also matches nothing"
    tiff = memoryview(data)[header.end() :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
    if order is None:
        return None
    try:
        (offset,) = struct.unpack_from(f"{order}L", tiff, 4)
        (tags,) = struct.unpack_from(f"{order}H", tiff, offset)
        for entry in range(offset + 2, offset + 2 + 12 * min(tags, _MAX_TAGS), 12):
            tag, tag_type, count = struct.unpack_from(f"{order}HHL", tiff, entry)
            if tag == _TAG and count == 1 and tag_type in _CODES:
                return int(struct.unpack_from(order + _CODES[tag_type], tiff, entry + 8)[0])
    except struct.error:  # the data are truncated
        return None
    return None


def _xmp_orientation(info: Mapping[Any, Any]) -> int | None:
    packet = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    match = _XMP_TAG.search(packet.encode("utf-8", "replace") if isinstance(packet, str) else packet)
    return int(match[1]) if match else None
