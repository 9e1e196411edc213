"""Check the zip archives that PyTorch writes before PyTorch opens them.

These checks refuse what PyTorch never writes but an attacker might: a small file that unpacks to a large one, members
that overlap, two members with the same name, and paths that lead out of a directory. They read only the archive's
directory.
"""

import itertools
import zipfile
from pathlib import Path, PurePosixPath
from typing import Final

from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.files.checksum import LENGTH, MARKER

# PyTorch compresses only code, never tensors; the code of a ResNet-152 takes 200 kB.
_MAX_COMPRESSED: Final = 16 << 20
_MAX_MEMBERS: Final = 100_000
_MAX_READ: Final = 16 << 20
_HEADER: Final = 30
"""The minimum size of a member's local header, without its name (APPNOTE.TXT, 4.3.7)."""


def require_safe_archive(path: Path) -> None:
    """Check that an archive is safe to unpack into memory.

    Raises:
        ModelFileError: the file is not a zip archive, or it is not safe to unpack.
    """
    try:
        problem = archive_problem(path)
    except Exception as error:  # the exceptions of zipfile for damaged archives have no common base class
        raise ModelFileError(f"{path} is not a zip archive ({error_message(error)})", "export it again") from error
    if problem:
        raise ModelFileError(f"{path} is not safe to open ({problem})", "export it again")


def archive_problem(path: Path) -> str | None:
    """Return why an archive is not safe to unpack into memory, or None.

    Raises:
        Exception: whatever zipfile raises, if the file is not a zip archive.
    """
    with zipfile.ZipFile(path) as archive:
        members, comment = archive.infolist(), archive.comment
    if comment and not (comment.startswith(MARKER) and len(comment) == LENGTH):
        return "its comment is not a complete checksum"
    return _directory_problem(members, path.stat().st_size)


def read_member(path: Path, suffix: str) -> bytes | None:
    """Return the content of the only member whose name ends with `suffix`, or None.

    Raises:
        ModelFileError: as for `read_members`, and if there are several such members.
    """
    found = read_members(path, suffix)
    if len(found) > 1:
        raise ModelFileError(f"{path} has {len(found)} members that end with {suffix}", "export it again")
    return next(iter(found.values()), None)


def read_members(path: Path, suffix: str) -> dict[str, bytes]:
    """Return the members whose names end with `suffix`, by name. Their CRC-32 is verified.

    Raises:
        ModelFileError: the file is not a zip archive or is damaged, or these members take more than 16 MiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            matching = [member for member in archive.infolist() if member.filename.endswith(suffix)]
            if sum(member.file_size for member in matching) > _MAX_READ:
                raise zipfile.BadZipFile(f"its members that end with {suffix} are too large")
            return {member.filename: archive.read(member) for member in matching}
    except Exception as error:  # as above
        raise ModelFileError(f"{path} is not a zip archive ({error_message(error)})", "export it again") from error


def _directory_problem(members: list[zipfile.ZipInfo], size: int) -> str | None:
    if not members or len(members) > _MAX_MEMBERS:
        return f"{len(members)} members"
    if len({member.filename for member in members}) < len(members):
        return "two members with the same name"
    for member in members:
        if problem := _member_problem(member, size):
            return f"member {member.filename[:60]!a} {problem}"
    unpacked = sum(member.file_size for member in members if member.compress_type != zipfile.ZIP_STORED)
    if unpacked > _MAX_COMPRESSED:
        return f"its compressed members unpack to {unpacked:,} bytes"
    return _span_problem(sorted((member.header_offset, member.compress_size + _HEADER) for member in members))


def _span_problem(spans: list[tuple[int, int]]) -> str | None:
    # A reader that looks for the directory elsewhere must not find another archive in front of this one.
    if spans[0][0]:
        return "it does not start with a member"
    if any(start + length > following for (start, length), (following, _) in itertools.pairwise(spans)):
        return "two members overlap"
    return None


def _member_problem(member: zipfile.ZipInfo, size: int) -> str | None:
    name = member.orig_filename  # as stored; zipfile truncates `filename` at a NUL
    if "\0" in name or "\\" in name or ":" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "has an unsafe path"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"uses compression method {member.compress_type}, which PyTorch does not support"
    if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
        return "is stored in fewer bytes than its declared size"
    if member.header_offset < 0 or member.header_offset + _HEADER + member.compress_size > size:
        return "extends beyond the end of the file"
    return None
