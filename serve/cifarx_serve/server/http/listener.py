"""From a listening socket to connections, and their orderly end."""

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

from cifarx_serve.errors import UsageError
from cifarx_serve.server.http.connection import Connection, uvicorn_config
from cifarx_serve.server.settings import Settings

_GRACE_S: Final = 0.5
"""While draining, a connection that had a request may send the next, which is on its way, for so long."""

_HANDSHAKE_S: Final = 0.2
"""While draining, a client that was told that it is connected gets through for so long: the way to it and back."""

_SPARE_S: Final = 1.0
"""A connection that was quiet for so long makes room where no more may be open."""

_LOOK_S: Final = 0.02
_FULL_S: Final = 0.01
_AGAIN_S: Final = 0.1
_OUT_OF_FILES_S: Final = 0.1


class HttpServer:
    """Serves an application on a socket that listens, and that other processes may listen on too.

    It accepts one connection at a time, so that of several processes the one with the least to do takes the next.

    Args:
        application: ASGI's.
        settings: limits, TLS.
        listener: the socket.
    """

    def __init__(self, application: Any, settings: Settings, listener: socket.socket) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what clients do wrong is in the access log
        self._limits = settings.limits
        self._config = uvicorn_config(application, settings.limits.keep_alive_s)
        self._tls = tls_context(settings.certificate, settings.private_key)
        self._listener = listener
        self._listener.setblocking(False)
        self._state = ServerState()
        self._opening: set[asyncio.Task[Any]] = set()
        self._dating: asyncio.Task[None] | None = None
        self._pausing: asyncio.TimerHandle | None = None
        self._full_at = -math.inf

    def start(self) -> None:
        """Accept connections from now on."""
        self._dating = asyncio.create_task(self._date())
        self._listen()

    async def drain(self) -> None:
        """Accept those that have come, answer what they ask, and close them; at most the deadline and the timeouts."""
        if self._dating is not None:
            await asyncio.sleep(_HANDSHAKE_S)
        self._ignore()
        with suppress(OSError):  # no more of them: it would block
            while True:
                self._adopt(self._listener.accept()[0])
        self._listener.close()
        limits = self._limits
        end = time.monotonic() + limits.deadline_s + limits.body_timeout_s + _GRACE_S
        while (self._state.connections or self._opening) and time.monotonic() < end:
            self._close_quiet()
            await asyncio.sleep(_LOOK_S)
        if self._dating is not None:
            self._dating.cancel()

    def _close_quiet(self) -> None:
        """Those that had their time to ask."""
        for connection in list(self._state.connections):
            if isinstance(connection, Connection):
                quiet_s = connection.quiet_s()
                if quiet_s is not None and quiet_s >= _GRACE_S * (1 if connection.asked else 2):
                    connection.end()

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _ignore(self) -> None:
        if self._pausing is not None:
            self._pausing.cancel()
        asyncio.get_running_loop().remove_reader(self._listener.fileno())

    def _pause(self, seconds: float) -> None:
        self._ignore()
        self._pausing = asyncio.get_running_loop().call_later(seconds, self._listen)

    def _accept(self) -> None:
        """One of those that wait. Not in a task: were it cancelled, it could lose a connection it has."""
        if len(self._state.connections) + len(self._opening) >= self._limits.max_connections:
            self._wait_for_room()
            return
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another process took it, or the client has left
            return
        except OSError:
            self._pause(_OUT_OF_FILES_S)
            return
        self._adopt(connection)

    def _wait_for_room(self) -> None:
        """Newcomers wait in the system's queue; at the second look, when no other process took them, one is let in."""
        now = time.monotonic()
        again, self._full_at = now - self._full_at < _AGAIN_S, now
        self._pause(0.0 if again and self._make_room() else _FULL_S)

    def _make_room(self) -> bool:
        """Close the connection that was quiet longest, if any was: who asks nothing keeps nobody out."""
        spare = [(each.spare_s(), each) for each in self._state.connections if isinstance(each, Connection)]
        for quiet_s, connection in sorted(spare, key=lambda each: each[0], reverse=True):
            if quiet_s < _SPARE_S:
                return False
            if not connection.has_unread():
                connection.drop()
                return True
        return False

    def _adopt(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        timeout = self._limits.header_timeout_s if self._tls else None
        try:
            await loop.connect_accepted_socket(
                lambda: Connection(self._config, self._state, self._limits.header_timeout_s),
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=timeout,
            )
        except (OSError, ConnectionError, TimeoutError):  # no TLS, or the client has left
            connection.close()

    async def _date(self) -> None:
        """HTTP wants the date in every answer; it changes once a second."""
        while True:
            self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            await asyncio.sleep(1)


def tls_context(certificate: str | None, private_key: str | None) -> ssl.SSLContext | None:
    """TLS for a server, None where there is no certificate.

    Raises:
        UsageError: one of the two files without the other, or what they hold does not fit.
    """
    if certificate is None and private_key is None:
        return None
    if certificate is None or private_key is None:
        raise UsageError("TLS takes a certificate and its key", "give both --certfile and --keyfile")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(Path(certificate), Path(private_key), password=_no_password)
    except (OSError, ValueError) as error:
        problem = f"cannot use {certificate} with {private_key} ({error})"
        raise UsageError(problem, "give a PEM certificate and its key, without a password") from error
    return context


def _no_password() -> str:
    """Else OpenSSL would ask for one on the terminal."""
    raise ValueError("the key has a password")
