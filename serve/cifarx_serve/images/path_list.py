"""Reads lists of paths: one per line, or separated by NUL bytes as `find -print0` writes them."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Final

from cifarx_serve.errors import UsageError, error_message
from cifarx_serve.files.regular_file import open_file_or_pipe

_CHUNK: Final = 1 << 16
_MAX_PATH: Final = 1 << 16  # bytes; Linux allows 4,096
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


def read_path_list(file: Path | IO[bytes], *, null_separated: bool = False) -> Iterator[str]:
    """Yield the paths of a list as they are read, so that it can be of any length.

    A path is taken as it is: spaces and characters of patterns belong to it, and bytes that are not UTF-8 are those of
    the file name. Empty lines are skipped, and so is the carriage return at the end of a line.

    Args:
        file: the path of the list, or an open binary file that is not closed.
        null_separated: whether the paths are separated by NUL bytes instead of line breaks.

    Raises:
        UsageError: the list cannot be read, or does not look like one.
    """
    name = str(file) if isinstance(file, Path) else "standard input"
    try:
        with open_file_or_pipe(file) if isinstance(file, Path) else nullcontext(file) as opened:
            entries = _split(opened, b"\0", name) if null_separated else _lines(opened, name)
            yield from (os.fsdecode(entry) for entry in entries if entry)
    except OSError as error:
        raise UsageError(f"cannot read the list {name} ({error_message(error)})", "check the path") from error


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    for number, line in enumerate(_split(file, b"\n", name)):
        if b"\0" in line:
            raise UsageError(f"{name} is not a list of paths in lines", "give -0 if NUL bytes separate them")
        yield (line if number else line.removeprefix(_BYTE_ORDER_MARK)).removesuffix(b"\r")


def _split(file: IO[bytes], separator: bytes, name: str) -> Iterator[bytes]:
    rest = b""
    read = getattr(file, "read1", file.read)  # what a pipe has written so far
    while chunk := read(_CHUNK):
        *entries, rest = (rest + chunk).split(separator)
        if len(rest) > _MAX_PATH:
            raise UsageError(f"{name} is not a list of paths", f"a path has at most {_MAX_PATH:,} bytes")
        yield from entries
    yield rest
