"""The directories in which cifarx caches what takes long to compute. Nobody but the user may change what is in them."""

import errno
import os
import stat
from pathlib import Path
from typing import Final

_NOT_PRIVATE: Final = "it belongs to another user, who could change what is cached"
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def cache_directory(name: str) -> Path:
    """Return the directory of one cache, which may not exist.

    The XDG base directory specification requires a relative path in `XDG_CACHE_HOME` to be ignored.

    Raises:
        OSError: the user has no home directory.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = cache_home if cache_home.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, str(error), "~/.cache") from error
    return base / "cifarx" / name


def create_cache_directory(name: str) -> Path:
    """Create the directory of one cache, accessible to this user only, and return it.

    Raises:
        OSError: it cannot be created, or belongs to another user.
    """
    directory = cache_directory(name)
    for path in (directory.parent, directory):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(path)
        if stat.S_IMODE(path.stat().st_mode) & _OTHERS:  # created by an older version
            path.chmod(0o700)
    return directory


def require_own(path: Path) -> None:
    """Check that a file or directory belongs to this user, and so does the link if it is one.

    Raises:
        OSError: it does not exist, or belongs to another user.
    """
    if hasattr(os, "geteuid") and {path.lstat().st_uid, path.stat().st_uid} != {os.geteuid()}:
        raise PermissionError(errno.EPERM, _NOT_PRIVATE, str(path))
