"""A listening Unix socket: its file replaces that of a server that has ended, and is removed at the end."""

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cifarx_serve.errors import UsageError, error_message

_MODE: Final = 0o666
"""Any user who can enter the directory can connect, as any user of the machine can to a port of 127.0.0.1.

Connecting requires permission to write, which the usual umask denies to others, such as the user of a reverse proxy.
"""

_CONNECT_TIMEOUT_S: Final = 1.0
"""How long a server whose backlog is full may take to accept a connection; it is considered to be running."""

_LOCK_TIMEOUT_S: Final = 5.0
_LOCK_POLL_S: Final = 0.02


class UnixSocket:
    """A listening socket with a file.

    Args:
        path: the file. If it is the socket of a server that has ended, it is replaced.
        backlog: the number of connections that may wait to be accepted.

    Attributes:
        listener: the socket.

    Raises:
        UsageError: another server listens on the socket, the file is not a socket, or it cannot be created.
    """

    def __init__(self, path: Path, backlog: int) -> None:
        self._path = path.absolute()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _locked(self._path.parent):  # two servers that start at once must not replace each other's socket
                self._remove_stale()
                self.listener.bind(str(self._path))
                self._file = self._path.lstat()
                self._path.chmod(_MODE)
                self.listener.listen(backlog)
        except OSError as error:
            self.listener.close()
            problem = f"cannot listen on the socket {path} ({error_message(error)})"
            raise UsageError(problem, "choose another --uds") from error
        except UsageError:
            self.listener.close()
            raise

    def remove(self) -> None:
        """Remove the file, before the socket is closed. Connections that it has received can still be accepted.

        A file that another program has put in its place is left alone.
        """
        if self.listener.fileno() < 0:  # it was removed before
            return
        with suppress(OSError):
            if os.path.samestat(self._path.lstat(), self._file):
                self._path.unlink()

    def _remove_stale(self) -> None:
        """Remove the file of a server that has ended.

        Raises:
            UsageError: a server listens on it, or it is not a socket.
            OSError: it cannot be tested or removed.
        """
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise UsageError(f"{self._path} exists and is not a socket", "remove it, or choose another --uds")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, suppress(TimeoutError, BlockingIOError):
            client.settimeout(_CONNECT_TIMEOUT_S)
            try:
                client.connect(str(self._path))
            except ConnectionRefusedError:
                self._path.unlink()
                return
        raise UsageError(f"another server listens on {self._path}", "stop it, or choose another --uds")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Exclude other servers that create a socket in a directory.

    Raises:
        OSError: the directory cannot be read, or another program keeps it locked.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    end = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
