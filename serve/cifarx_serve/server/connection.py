"""One connection of a client: uvicorn's, with limits on how long and how large a request's head may be."""

import asyncio
from http import HTTPStatus
from typing import Any, Final

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cifarx_serve.server.application import error_body

_MAX_HEAD: Final = 64 * 1024
"""Bytes of a request's first line and headers."""


class _OneWrite:
    """A transport that sends what is written in one turn of the event loop by one system call.

    uvicorn writes an answer's head and body apart, and each call wakes the client: a fifth of a small request's time.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, []
            self._transport.write(b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """Args are uvicorn's.

    Args:
        header_timeout_s: from the opening of the connection, or from a request's first byte, to the end of its head.
    """

    def __init__(self, config: Config, server_state: ServerState, header_timeout_s: float) -> None:
        super().__init__(config, server_state, {})
        self._header_timeout_s = header_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._opened = False
        self._quiet_since: float | None = None

    def quiet_s(self) -> float | None:
        """Seconds since its last request was answered, or since it was opened; None while one is under way."""
        return None if self._quiet_since is None else asyncio.get_running_loop().time() - self._quiet_since

    @property
    def asked(self) -> bool:
        """Whether it ever had a request."""
        return self._opened

    def end(self) -> None:
        """Close it; for one that is quiet."""
        self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_OneWrite(transport))  # type: ignore[arg-type]
        self._quiet_since = self.loop.time()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD:
                status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                self._refuse(status, f"a head of over {_MAX_HEAD:,} bytes: send fewer or shorter headers")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP; called by uvicorn."""
        self._refuse(HTTPStatus.BAD_REQUEST, f"{msg.rstrip('.').lower()}: send HTTP/1.1")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._opened = True
        self._quiet_since = None
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._quiet_since = self.loop.time()

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._header_timeout_s, self._late)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        if self._opened:
            problem = f"the head of the request did not come within {self._header_timeout_s:g} s: send it faster"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, problem)
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, problem: str) -> None:
        """Answer without the application, and close."""
        self._end_head()
        if self.transport.is_closing():
            return
        body = error_body(problem)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def uvicorn_config(application: Any, keep_alive_s: float) -> Config:
    """What `Connection` takes of uvicorn: its protocol alone; no logs, no lifespan, no signals."""
    config = Config(
        application,
        http=Connection,
        ws="none",
        loop="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=max(1, round(keep_alive_s)),
    )
    config.load()
    return config
