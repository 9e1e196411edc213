"""Write files and directories atomically: the target either has its whole content or does not change."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cifarx_serve.errors import OutputError, error_message

# Errors that have nothing to do with the space on the disk.
_WRONG_PATH: Final = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
        *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    }
)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `target` if the block succeeds, and removed otherwise.

    The content is flushed to the disk before the rename, so that a power failure leaves either the old file or the
    new one. The temporary name is in the same directory. It starts with a dot, so that it is not mistaken for a
    finished file, and has the suffix of the target.

    Raises:
        OutputError: the directory cannot be created or written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(target))
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=f".partial{target.suffix}", dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        _flush(temporary)
        temporary.replace(target)
        _flush(target.parent)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `target` if the block succeeds, and is removed otherwise.

    A directory cannot be renamed over one that is not empty. So the old directory is moved aside first, and moved back
    if the new one cannot take its place.

    Raises:
        OutputError: the directory cannot be created or written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "Is a file", str(target))
        with tempfile.TemporaryDirectory(prefix=".", suffix=f".partial{target.suffix}", dir=target.parent) as place:
            new, old = Path(place) / "new", Path(place) / "old"
            new.mkdir()
            yield new
            for path in (*new.rglob("*"), new):
                _flush(path)
            try:
                if target.exists():
                    target.rename(old)
                new.rename(target)
            except BaseException:  # also an interrupt: the old directory would be removed with the temporary one
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
            _flush(target.parent)
    except OSError as error:
        raise write_error(target, error) from error


def remove_partial_files(directory: Path, suffix: str) -> None:
    """Remove the temporary files that killed processes left while they wrote files with this suffix.

    No other process may be writing such files in the directory.
    """
    for leftover in directory.glob(f".*.partial{suffix}"):
        leftover.unlink(missing_ok=True)


def require_writable(directory: Path) -> None:
    """Create `directory` and check that files can be created in it, so that a long run does not fail at its end.

    Raises:
        OutputError: the directory cannot be created or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0")
    except OSError as error:
        raise write_error(directory, error) from error


def write_error(target: Path, error: OSError) -> OutputError:
    """Return the exception for a path that the system could not write."""
    reason = error_message(error)
    with suppress(OSError):  # a name that is too long, among others
        if target.is_symlink() and not target.exists():
            reason = f"{reason}: it is a link to {target.readlink()}, which does not exist"
    remedy = "choose another path" if error.errno in _WRONG_PATH else "free some space or choose another path"
    return OutputError(f"cannot write {target} ({reason})", remedy)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
