"""Locks a directory for one run, so that two runs do not overwrite each other's files."""

import errno
import os
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cifarx_serve.errors import FallbackWarning, OutputError, error_message
from cifarx_serve.files.atomic import write_error

FILE_NAME: Final = ".cifarx.lock"
"""The file in the directory that is locked. Its content names the owner."""

_MAX_OWNER_BYTES: Final = 200

# What a file system returns that does not support locks.
_UNSUPPORTED: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Create a directory, and hold its lock for the block.

    The system releases the lock when the process ends, however it ends. Where locks are not supported, a
    FallbackWarning says so. If the directory is empty after the block and was created here, it is removed.

    Raises:
        OutputError: another process holds the lock, or the directory cannot be written.
    """
    created = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(directory)
    except OSError as error:
        _remove_empty(created)
        raise write_error(directory, error) from error
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (directory / FILE_NAME).unlink()
            os.close(descriptor)
        _remove_empty(created)


def _lock(directory: Path) -> int | None:
    """Return a descriptor that holds the lock; None if locks are not supported."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return None
    while True:
        descriptor = _open(directory / FILE_NAME)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(descriptor, directory / FILE_NAME):  # else its owner has removed it at the same time
                _write_owner(descriptor)
                return descriptor
        except BlockingIOError as error:
            owner = os.pread(descriptor, _MAX_OWNER_BYTES, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise OutputError(
                f"another run writes into {directory} ({owner or 'its process is not known'})",
                "wait until it has ended, or give another --out",
            ) from error
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"cannot lock {directory} ({error_message(error)}): do not start another run there",
                FallbackWarning,
                stacklevel=4,
            )
            return None
        os.close(descriptor)


def _open(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def _is_current(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _write_owner(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, the innermost first, as far as they are empty."""
    for path in directories:
        with suppress(OSError):
            path.rmdir()
