"""A sha256 inside the file it is of, so that one changed byte is found with nothing but the file.

A sealed file ends with `cifarx-seal:` and 64 hexadecimal digits: the sha256 of every byte before the digits. Both kinds
of file that are sealed have a place at their end that their readers leave alone: in ONNX an entry of `metadata_props`,
which protobuf takes after all else; in a zip archive, PyTorch's files among them, the archive's comment.

A seal finds accidents: a bad copy, a bad disk. It is no signature: who changes a file on purpose can seal it again.
"""

import hashlib
import os
import re
import zipfile
from enum import Enum
from pathlib import Path
from typing import IO, Final, NamedTuple

from cifarx_serve.errors import ModelFileError

MARKER: Final = b"cifarx-seal:"
KEY: Final = b"cifarx.seal"
"""The key of the seal in an ONNX file's `metadata_props`."""

_DIGITS: Final = 64
LENGTH: Final = len(MARKER) + _DIGITS
"""Of a seal, in bytes."""

_BLOCK: Final = 1 << 20

# End of central directory (APPNOTE.TXT, 4.3.16): 22 bytes, the last two of them the length of the comment.
_ZIP_START: Final = b"PK\x03\x04"
_ZIP_END: Final = b"PK\x05\x06"
_ZIP_END_SIZE: Final = 22


class SealState(Enum):
    """What a seal says of its file."""

    INTACT = "intact"
    CHANGED = "changed"
    ABSENT = "absent"


class Seal(NamedTuple):
    """A file's seal: its state, and the sha256 it states, in hexadecimal; empty where there is none."""

    state: SealState
    sha256: str = ""


def seal(path: Path) -> None:
    """Put a seal on a file, or renew the one it has; in place, so before the file gets its name.

    The rest of the file keeps its bytes (of an archive, but for the length of its comment).

    Raises:
        ModelFileError: neither `.onnx` nor a zip archive, or an archive with a comment of its own.
        OSError: it cannot be written.
    """
    with path.open("r+b") as file:
        if _marker(file) != MARKER:
            _make_room(file, path)
        size = file.seek(0, os.SEEK_END)
        digits = _sha256(file, size - _DIGITS).encode()
        file.seek(size - _DIGITS)
        file.write(digits)


def read_seal(path: Path) -> Seal:
    """Whether a file is as it was sealed; reads all of it, a block at a time.

    A file that lost its end has lost its seal: it is ABSENT, not CHANGED.
    """
    with path.open("rb") as file:
        if _marker(file) != MARKER:
            return Seal(SealState.ABSENT)
        stated = file.read(_DIGITS)
        found = _sha256(file, file.tell() - _DIGITS)
    if not re.fullmatch(rb"[0-9a-f]{64}", stated):
        return Seal(SealState.CHANGED)
    return Seal(SealState.INTACT if stated == found.encode() else SealState.CHANGED, stated.decode())


def damaged_member(path: Path) -> str | None:
    """The first member of a zip archive whose CRC-32 is not that of its content, or None.

    A checksum of members says nothing of what lies between them: dates, padding, comments.

    Raises:
        zipfile.BadZipFile: not an archive, or one whose directory is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _marker(file: IO[bytes]) -> bytes:
    """What stands where a seal's marker is; the file is then at the digits."""
    size = file.seek(0, os.SEEK_END)
    if size < LENGTH:
        return b""
    file.seek(size - LENGTH)
    return file.read(len(MARKER))


def _sha256(file: IO[bytes], size: int) -> str:
    """Of a file's first bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (block := file.read(min(_BLOCK, size))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _make_room(file: IO[bytes], path: Path) -> None:
    """Append the marker and digits still to be written, as the file's format has it."""
    room = MARKER + b"0" * _DIGITS
    file.seek(0)
    if file.read(len(_ZIP_START)) == _ZIP_START:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - _ZIP_END_SIZE)
        end = file.read()
        if not end.startswith(_ZIP_END) or end[-2:] != b"\0\0":
            raise ModelFileError(f"{path} is an archive with a comment, or damaged", "export it again")
        file.seek(size - 2)
        file.write(LENGTH.to_bytes(2, "little") + room)
    elif path.suffix == ".onnx":
        file.seek(0, os.SEEK_END)
        entry = _field(1, KEY) + _field(2, room)
        file.write(_field(14, entry))
    else:
        raise ModelFileError(f"{path} has no place for a seal", "seal ONNX files and zip archives")


def _field(number: int, content: bytes) -> bytes:
    """A field of protobuf's wire format: tag, length, content; below 128 both take one byte."""
    return bytes([number << 3 | 2, len(content)]) + content
