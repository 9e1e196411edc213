"""Opens files for reading, and refuses what can block forever or never ends: devices, sockets and idle pipes."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import Final

NOT_REGULAR: Final = "not a regular file"
"""The reason in the errors for devices, sockets and pipes."""

_MAX_TEXT_BYTES: Final = 1 << 24

_PIPE_TIMEOUT_MS: Final = 2000
"""How long a named pipe may be empty before it is considered to have no writer."""

_SHELL_PIPES: Final = ("/dev/fd/", "/proc/self/fd/")
"""Where a shell puts the pipe of a process substitution, `<(command)`."""

_READ: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Without O_NONBLOCK, opening a named pipe would block until it has a writer. Regular files ignore it."""


def require_regular_file(path: Path) -> None:
    """Check a path that a library will open.

    Raises:
        OSError: the path does not exist, or is a directory, device, socket or pipe.
    """
    _require_regular(path.stat().st_mode, path)


def open_regular_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: the file cannot be opened, or is a directory, device, socket or pipe.
    """
    descriptor = os.open(path, _READ)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def open_file_or_pipe(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file, or a pipe that another program writes, such as `<(command)` of a shell.

    Raises:
        OSError: as for `open_regular_file`, but of pipes only for a named one that nobody writes.
    """
    descriptor = os.open(path, _READ)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISFIFO(mode):
            _require_regular(mode, path)
        else:
            if not os.fspath(path).startswith(_SHELL_PIPES):
                _require_writer(descriptor, path)
            os.set_blocking(descriptor, True)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: as for `open_regular_file`, or the file has more than `max_bytes`.
    """
    with open_regular_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", os.fspath(path))
    return content


def read_text_file(path: str | os.PathLike[str]) -> str:
    """Return the content of a regular file of text, such as a recipe or a list of class names.

    Raises:
        OSError: as for `open_regular_file`, or the file has more than 16 MiB.
        UnicodeError: the file is not UTF-8.
    """
    return read_regular_file(path, _MAX_TEXT_BYTES).decode("utf-8")


def _require_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, os.fspath(path))


def _require_writer(pipe: int, path: str | os.PathLike[str]) -> None:
    """Wait until a named pipe has data, or raise an OSError if it has none after a while."""
    import select  # few files are pipes

    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    if not waiting.poll(_PIPE_TIMEOUT_MS):
        raise OSError(errno.EINVAL, f"{NOT_REGULAR}, and nothing writes to the pipe", os.fspath(path))
