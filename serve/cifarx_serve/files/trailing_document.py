"""A document after the end of a model file, for formats whose readers ignore what follows.

The document is followed by its length, eight bytes in little-endian order, and by `MARKER`. A checksum may come after
it.
"""

import os
from pathlib import Path
from typing import IO, Final

from cifarx_serve.files.checksum import LENGTH as CHECKSUM_LENGTH
from cifarx_serve.files.checksum import MARKER as CHECKSUM_MARKER
from cifarx_serve.files.regular_file import open_regular_file

MARKER: Final = b"cifarx-spec:"
"""The bytes after the length."""

_LENGTH_BYTES: Final = 8
_MAX_DOCUMENT_BYTES: Final = 1 << 24


def append_document(path: Path, document: bytes) -> None:
    """Append a document to a file that has neither a document nor a checksum."""
    with path.open("ab") as file:
        file.write(document + len(document).to_bytes(_LENGTH_BYTES, "little") + MARKER)


def read_document(path: Path) -> bytes | None:
    """Return the document of a file, or None if it has none, or one of more than 16 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular_file(path) as file:
        end = _end_of_document(file)
        start = end - len(MARKER) - _LENGTH_BYTES
        length = int.from_bytes(_read_at(file, start, _LENGTH_BYTES), "little")
        if _read_at(file, start + _LENGTH_BYTES, len(MARKER)) != MARKER or length > min(start, _MAX_DOCUMENT_BYTES):
            return None
        return _read_at(file, start - length, length)


def _end_of_document(file: IO[bytes]) -> int:
    """Return where the document ends if there is one: at the end of the file, or before its checksum."""
    size = file.seek(0, os.SEEK_END)
    checksum = size - CHECKSUM_LENGTH
    without = _read_at(file, size - len(MARKER), len(MARKER)) == MARKER
    return size if without or _read_at(file, checksum, len(CHECKSUM_MARKER)) != CHECKSUM_MARKER else checksum


def _read_at(file: IO[bytes], position: int, size: int) -> bytes:
    """Return bytes at a position, or none if it is before the start."""
    if position < 0:
        return b""
    file.seek(position)
    return file.read(size)
