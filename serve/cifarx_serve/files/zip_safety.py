"""Zip archives as PyTorch writes them, looked at before PyTorch opens them.

What is refused here is what no writer of PyTorch's makes and an attacker would: a small file that unpacks to a large
one, two members on the same bytes, two of one name, a name that leads out of a folder. Only the archive's directory
is read.
"""

import itertools
import zipfile
from pathlib import Path, PurePosixPath
from typing import Final

from cifarx_serve.errors import ModelFileError
from cifarx_serve.files.checksum import LENGTH, MARKER

# PyTorch stores tensors as they are and compresses code alone; the code of a ResNet-152 is 200 kB.
_MAX_COMPRESSED: Final = 16 << 20
_MAX_MEMBERS: Final = 100_000
_MAX_READ: Final = 16 << 20
_HEADER: Final = 30
"""The least bytes of a member beside its name and content: its local header (APPNOTE.TXT, 4.3.7)."""


def require_sound_archive(path: Path) -> None:
    """Look at an archive's directory.

    Raises:
        ModelFileError: no archive, or one that it is not safe to unpack into memory.
    """
    try:
        problem = archive_problem(path)
    except Exception as error:  # what zipfile raises on damaged archives has no common base
        raise ModelFileError(f"{path} is not an archive ({_reason(error)})", "export it again") from error
    if problem:
        raise ModelFileError(f"{path} is not a sound archive ({problem})", "it is not opened; export it again")


def archive_problem(path: Path) -> str | None:
    """Why it is not safe to unpack an archive into memory, or None; what zipfile raises where it is none."""
    with zipfile.ZipFile(path) as archive:
        members, comment = archive.infolist(), archive.comment
    if comment and not (comment.startswith(MARKER) and len(comment) == LENGTH):
        return "its comment is no whole seal"
    return _problem(members, path.stat().st_size)


def read_member(path: Path, suffix: str) -> bytes | None:
    """The one member whose name ends so, or None; raises as `read_members` does, and where there are two."""
    found = read_members(path, suffix)
    if len(found) > 1:
        raise ModelFileError(f"{path} has {len(found)} members {suffix}", "export it again")
    return next(iter(found.values()), None)


def read_members(path: Path, suffix: str) -> dict[str, bytes]:
    """The members whose names end so, by name; their checksums hold.

    Raises:
        ModelFileError: no archive, damaged, or more than 16 MiB of them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            fitting = [member for member in archive.infolist() if member.filename.endswith(suffix)]
            if sum(member.file_size for member in fitting) > _MAX_READ:
                raise zipfile.BadZipFile(f"its members {suffix} are too large")
            return {member.filename: archive.read(member) for member in fitting}
    except Exception as error:  # as above
        raise ModelFileError(f"{path} is not an archive ({_reason(error)})", "export it again") from error


def _problem(members: list[zipfile.ZipInfo], size: int) -> str | None:
    if not members or len(members) > _MAX_MEMBERS:
        return f"{len(members)} members"
    if len({member.filename for member in members}) < len(members):
        return "two members of one name"
    for member in members:
        if problem := _member_problem(member, size):
            return f"member {_told(member.filename)} {problem}"
    compressed = sum(member.file_size for member in members if member.compress_type != zipfile.ZIP_STORED)
    if compressed > _MAX_COMPRESSED:
        return f"{compressed:,} bytes when unpacked"
    return _span_problem(sorted((member.header_offset, member.compress_size + _HEADER) for member in members))


def _span_problem(spans: list[tuple[int, int]]) -> str | None:
    # A reader that looks for the directory elsewhere must not find another archive in front of this one.
    if spans[0][0]:
        return "it does not begin with a member"
    if any(start + length > following for (start, length), (following, _) in itertools.pairwise(spans)):
        return "two members on the same bytes"
    return None


def _member_problem(member: zipfile.ZipInfo, size: int) -> str | None:
    name = member.orig_filename  # as it stands in the file; zipfile cuts it at a NUL
    if "\0" in name or "\\" in name or ":" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "has a name that leads elsewhere"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed in a way PyTorch has not (method {member.compress_type})"
    if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
        return "is stored in fewer bytes than it has"
    if member.header_offset < 0 or member.header_offset + _HEADER + member.compress_size > size:
        return "lies beyond the end of the file"
    return None


def _told(name: str) -> str:
    """At most 60 characters, on one line."""
    return ascii(name[:60])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
