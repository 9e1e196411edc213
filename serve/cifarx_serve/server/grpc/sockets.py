"""The sockets of a port, which gRPC opens and does not show: stops new connections, and finds open ones."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from cifarx_serve.system.socket_filter import drop_new_connections

_DESCRIPTORS: Final = "/dev/fd"
"""Lists the file descriptors of the process that reads it, on Linux and macOS."""


def drop_connections(port: int) -> None:
    """Drop new TCP handshakes with this process's listeners on a port; those that have begun still finish."""
    for opened in _sockets(port):
        if _is_listening(opened):
            drop_new_connections(opened)


def stop_listening(port: int) -> None:
    """Refuse new connections to this process's listeners on a port, so that other processes get them."""
    for opened in _sockets(port):
        if _is_listening(opened):
            opened.shutdown(socket.SHUT_RD)


def has_connections(port: int) -> bool:
    """Return whether this process has connections that were accepted on a port."""
    return any(not _is_listening(opened) and _is_connected(opened) for opened in _sockets(port))


def _sockets(port: int) -> Iterator[socket.socket]:
    """Yield the TCP sockets whose local port this is. They are still gRPC's, which may close them at any time."""
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208  many names
        with suppress(OSError):  # it is no socket, or was closed meanwhile
            opened = socket.socket(fileno=int(name))
            try:
                if opened.family in (socket.AF_INET, socket.AF_INET6) and opened.getsockname()[1] == port:
                    yield opened
            finally:
                opened.detach()


def _is_listening(opened: socket.socket) -> bool:
    return bool(opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is_connected(opened: socket.socket) -> bool:
    with suppress(OSError):
        opened.getpeername()
        return True
    return False
