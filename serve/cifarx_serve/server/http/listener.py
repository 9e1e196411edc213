"""Accepts connections on a socket, and drains them at the end."""

import asyncio
import logging
import math
import socket
import ssl
import time
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any, Final

from uvicorn.server import ServerState

from cifarx_serve.errors import UsageError, error_message
from cifarx_serve.files.regular_file import require_regular_file
from cifarx_serve.server.http.connection import Connection, uvicorn_config
from cifarx_serve.server.settings import Settings

_GRACE_S: Final = 0.5
"""How long a drained connection stays open for a next request that is already on its way."""

_HANDSHAKE_S: Final = 0.2
"""How long draining waits for handshakes of clients that already consider themselves connected: one round trip."""

_EVICTABLE_S: Final = 1.0
"""How long a connection must have been idle before it is closed to make room for another one."""

_DRAIN_POLL_S: Final = 0.02
_FULL_PAUSE_S: Final = 0.01
_FULL_AGAIN_S: Final = 0.1
_FILE_LIMIT_PAUSE_S: Final = 0.1


class Listener:
    """Serves an application on a listening socket, which may be shared with other processes.

    It accepts one connection at a time, so that the least busy process takes the next one.

    Args:
        app: the ASGI application.
        settings: the limits and the TLS files.
        sock: the listening socket.

    Raises:
        UsageError: the TLS files cannot be used.
    """

    def __init__(self, app: Any, settings: Settings, sock: socket.socket) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the access log has the errors of clients
        self._limits = settings.limits
        self._config = uvicorn_config(app, settings.limits.keep_alive_s)
        self._ssl_context = create_ssl_context(settings.certfile, settings.keyfile)
        self._socket = sock
        self._socket.setblocking(False)
        self._state = ServerState()
        self._connecting: set[asyncio.Task[Any]] = set()
        self._date_task: asyncio.Task[None] | None = None
        self._resume_timer: asyncio.TimerHandle | None = None
        self._last_full_at = -math.inf

    def start(self) -> None:
        """Start to accept connections."""
        self._date_task = asyncio.create_task(self._update_date())
        self._resume()

    async def drain(self) -> None:
        """Accept the connections in the queue of the socket, answer all requests, and close all connections.

        This takes no longer than the deadline and the timeout of the body together, and a grace period.
        """
        if self._date_task is not None:
            await asyncio.sleep(_HANDSHAKE_S)
        self._stop()
        with suppress(OSError):  # BlockingIOError: the queue is empty
            while True:
                self._open(self._socket.accept()[0])
        self._socket.close()
        limits = self._limits
        end = time.monotonic() + limits.deadline_s + limits.body_timeout_s + _GRACE_S
        while (self._state.connections or self._connecting) and time.monotonic() < end:
            self._close_idle()
            await asyncio.sleep(_DRAIN_POLL_S)
        if self._date_task is not None:
            self._date_task.cancel()

    def _close_idle(self) -> None:
        """Close the connections whose grace period is over; it is twice as long before the first request."""
        for connection in list(self._state.connections):
            if isinstance(connection, Connection):
                idle_s = connection.idle_s()
                if idle_s is not None and idle_s >= _GRACE_S * (1 if connection.has_received_request else 2):
                    connection.close()

    def _resume(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._accept)

    def _stop(self) -> None:
        if self._resume_timer is not None:
            self._resume_timer.cancel()
        asyncio.get_running_loop().remove_reader(self._socket.fileno())

    def _pause(self, seconds: float) -> None:
        self._stop()
        self._resume_timer = asyncio.get_running_loop().call_later(seconds, self._resume)

    def _accept(self) -> None:
        """Accept one connection. This is not a task, because a cancelled task could lose an accepted connection."""
        if len(self._state.connections) + len(self._connecting) >= self._limits.max_connections:
            self._wait_for_room()
            return
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another process accepted it, or the client disconnected
            return
        except OSError:  # usually the limit of open files
            self._pause(_FILE_LIMIT_PAUSE_S)
            return
        self._open(connection)

    def _wait_for_room(self) -> None:
        """Leave new connections in the queue of the socket, and make room if no other process accepts them soon."""
        now = time.monotonic()
        full_again, self._last_full_at = now - self._last_full_at < _FULL_AGAIN_S, now
        self._pause(0.0 if full_again and self._evict_idle() else _FULL_PAUSE_S)

    def _evict_idle(self) -> bool:
        """Close the longest-idle connection to make room; return whether there was one."""
        candidates = [(each.evictable_s(), each) for each in self._state.connections if isinstance(each, Connection)]
        for evictable_s, connection in sorted(candidates, key=lambda each: each[0], reverse=True):
            if evictable_s < _EVICTABLE_S:
                return False
            if not connection.has_unread_data():
                connection.abort()
                return True
        return False

    def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.create_task(self._connect(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        """Attach the protocol to an accepted connection, after the TLS handshake."""
        loop = asyncio.get_running_loop()
        timeout = self._limits.header_timeout_s if self._ssl_context else None
        try:
            await loop.connect_accepted_socket(
                lambda: Connection(self._config, self._state, self._limits.header_timeout_s),
                connection,
                ssl=self._ssl_context,
                ssl_handshake_timeout=timeout,
            )
        except (OSError, ConnectionError, TimeoutError):  # the client does not speak TLS, or has disconnected
            connection.close()

    async def _update_date(self) -> None:
        """Update the `Date` header of all responses once per second."""
        while True:
            self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            await asyncio.sleep(1)


def create_ssl_context(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    """Return the TLS context of a server; None if there is no certificate.

    Raises:
        UsageError: only one of the files is given, or they cannot be used together.
    """
    if certfile is None and keyfile is None:
        return None
    if certfile is None or keyfile is None:
        raise UsageError("TLS requires a certificate and its key", "give both --certfile and --keyfile")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        for file in (certfile, keyfile):
            require_regular_file(Path(file))
        context.load_cert_chain(Path(certfile), Path(keyfile), password=_reject_password)
    except (OSError, ValueError) as error:
        problem = f"cannot use {certfile} with {keyfile} ({error_message(error)})"
        raise UsageError(problem, "give a PEM certificate and its key, without a password") from error
    return context


def _reject_password() -> str:
    """Refuse to give OpenSSL a password, for which it would otherwise prompt on the terminal."""
    raise ValueError("the key has a password")
