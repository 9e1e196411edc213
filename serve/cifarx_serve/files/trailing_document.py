"""A document after the end of a model file, for formats whose readers ignore what follows.

The document is followed by its length, eight bytes in little-endian order, and by `MARKER`. A checksum may come after
it.
"""

import os
from pathlib import Path
from typing import Final

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
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - CHECKSUM_LENGTH))
        if file.read(len(CHECKSUM_MARKER)) == CHECKSUM_MARKER:
            end -= CHECKSUM_LENGTH
        start = end - len(MARKER) - _LENGTH_BYTES
        file.seek(max(0, start))
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if file.read(len(MARKER)) != MARKER or length > min(start, _MAX_DOCUMENT_BYTES):
            return None
        file.seek(start - length)
        return file.read(length)
