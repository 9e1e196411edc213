"""Store the checksum of a file in the file itself, so that a changed byte is detected without any other file.

The file ends with `cifarx-seal:` and 64 hexadecimal digits: the SHA-256 of all bytes before the digits. All supported
formats have a place at their end that other readers ignore: an entry of `metadata_props` in ONNX, which protobuf allows
after all other fields; the comment of a zip archive, such as PyTorch's files; and whatever follows the model in an
ExecuTorch or a LiteRT file.

The checksum detects accidental damage from a bad copy or a bad disk. It is not a signature: anyone who changes a file
on purpose can also write a new checksum.
"""

import hashlib
import os
import re
from enum import Enum
from pathlib import Path
from typing import IO, Final, NamedTuple

from cifarx_serve.errors import ModelFileError

MARKER: Final = b"cifarx-seal:"
"""The bytes before the digits."""

_ONNX_KEY: Final = b"cifarx.seal"
"""The key of the checksum in the `metadata_props` of an ONNX file."""

_TRAILING: Final = (".pte", ".tflite")
"""The suffixes of files whose readers ignore what follows the model."""

_DIGITS: Final = 64
LENGTH: Final = len(MARKER) + _DIGITS
"""The size of the marker and the digits, in bytes."""

_BLOCK: Final = 1 << 20

# End of central directory (APPNOTE.TXT, 4.3.16): 22 bytes, the last two of which are the length of the comment.
_ZIP_START: Final = b"PK\x03\x04"
_ZIP_END: Final = b"PK\x05\x06"
_ZIP_END_SIZE: Final = 22


class ChecksumState(Enum):
    """The result of comparing a file with its checksum."""

    INTACT = "intact"
    CHANGED = "changed"
    ABSENT = "absent"


class Checksum(NamedTuple):
    """The checksum of a file.

    Attributes:
        state: whether the checksum matches the content.
        sha256: the stored checksum in hexadecimal, or an empty string if there is no valid one.
    """

    state: ChecksumState
    sha256: str = ""


def write_checksum(path: Path) -> None:
    """Add a checksum to a file, or update the existing one.

    The file is changed in place, so call this before the file gets its final name. The other bytes do not change,
    except for the length of the comment of a zip archive.

    Raises:
        ModelFileError: the file is neither `.onnx`, `.pte`, `.tflite` nor a zip archive, or the archive already has a
            comment.
        OSError: the file cannot be written.
    """
    with path.open("r+b") as file:
        if _read_marker(file) != MARKER:
            _append_placeholder(file, path)
        size = file.seek(0, os.SEEK_END)
        digits = _sha256(file, size - _DIGITS).encode()
        file.seek(size - _DIGITS)
        file.write(digits)


def read_checksum(path: Path) -> Checksum:
    """Compare a file with its checksum. The whole file is read, one block at a time.

    The state of a file that was truncated is ABSENT rather than CHANGED, because the checksum is at the end.
    """
    with path.open("rb") as file:
        if _read_marker(file) != MARKER:
            return Checksum(ChecksumState.ABSENT)
        stored = file.read(_DIGITS)
        actual = _sha256(file, file.tell() - _DIGITS)
    if not re.fullmatch(rb"[0-9a-f]{64}", stored):
        return Checksum(ChecksumState.CHANGED)
    state = ChecksumState.INTACT if stored == actual.encode() else ChecksumState.CHANGED
    return Checksum(state, stored.decode())


def require_intact(path: Path) -> None:
    """Check that a file matches its checksum, if it has one.

    Raises:
        ModelFileError: a byte was changed since the checksum was written.
    """
    if read_checksum(path).state is ChecksumState.CHANGED:
        raise ModelFileError(f"the checksum of {path} does not match", "get the file again, or export it again")


def damaged_member(path: Path) -> str | None:
    """Return the name of the first member of a zip archive whose CRC-32 does not match its content, or None.

    The bytes between members, such as dates, padding and comments, are not covered.

    Raises:
        zipfile.BadZipFile: the file is not a zip archive, or its directory is damaged.
    """
    import zipfile  # imported here because every model that is opened needs a checksum, but few this function

    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _read_marker(file: IO[bytes]) -> bytes:
    """Return the bytes where the marker would be, and leave the file at the digits."""
    size = file.seek(0, os.SEEK_END)
    if size < LENGTH:
        return b""
    file.seek(size - LENGTH)
    return file.read(len(MARKER))


def _sha256(file: IO[bytes], size: int) -> str:
    """Return the SHA-256 of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (block := file.read(min(_BLOCK, size))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _append_placeholder(file: IO[bytes], path: Path) -> None:
    """Append the marker and zeros for the digits, where the format of the file allows them."""
    placeholder = MARKER + b"0" * _DIGITS
    file.seek(0)
    if file.read(len(_ZIP_START)) == _ZIP_START:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - _ZIP_END_SIZE)
        end = file.read()
        if not end.startswith(_ZIP_END) or end[-2:] != b"\0\0":
            raise ModelFileError(f"{path} is a zip archive with a comment, or is damaged", "export it again")
        file.seek(size - 2)
        file.write(LENGTH.to_bytes(2, "little") + placeholder)
    elif path.suffix == ".onnx":
        file.seek(0, os.SEEK_END)
        entry = _field(1, _ONNX_KEY) + _field(2, placeholder)
        file.write(_field(14, entry))
    elif path.suffix in _TRAILING:
        file.seek(0, os.SEEK_END)
        file.write(placeholder)
    else:
        raise ModelFileError(
            f"{path} cannot hold a checksum", "use an ONNX, ExecuTorch or LiteRT file, or a zip archive"
        )


def _field(number: int, content: bytes) -> bytes:
    """Return a field in protobuf's wire format: tag, length and content. Tag and length must be below 128."""
    return bytes([number << 3 | 2, len(content)]) + content
