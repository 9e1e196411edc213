"""Files that are either wholly there or not there at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cifarx_serve.errors import OutputError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it when the block ends well and removed when it does not.

    The bytes are flushed to the disk before the rename, so that a power cut leaves the old file or the new one.
    The temporary name keeps the target's suffix and starts with a dot: nothing takes it for a finished file.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(None, "Is a directory", str(target))
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=f".partial{target.suffix}", dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        _flush(temporary)
        temporary.replace(target)
        _flush(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and is removed when not.

    A folder cannot be renamed over another that has content: the old one steps aside first and comes back where
    the new one cannot take its place.

    Raises:
        OutputError: the place cannot be made or written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            raise NotADirectoryError(None, "Is a file", str(target))
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
            except BaseException:  # an interrupt too: the old folder would go with the temporary one
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
            _flush(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error


def remove_leftovers(folder: Path, suffix: str) -> None:
    """Remove what killed writers of files with that suffix left half written; nobody else may be writing there."""
    for leftover in folder.glob(f".*.partial{suffix}"):
        leftover.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Make `folder` and find out now, not after an hour of training, whether files can be made in it.

    Raises:
        OutputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(target: Path, error: OSError) -> OutputError:
    """The error for a path that the system would not write."""
    return OutputError(
        f"cannot write {target} ({error.strerror or error})",
        "free some space or name another place",
    )


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder to flush it
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
