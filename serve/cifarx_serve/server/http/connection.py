"""A client connection: uvicorn's protocol, with limits on the time and the size of request headers."""

import asyncio
import selectors
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cifarx_serve.server.http.request import IS_DISCONNECTED
from cifarx_serve.server.http.response import error_body

_MAX_HEADER_BYTES: Final = 64 * 1024
"""Maximum size of the request line and headers, and of everything else that is not body, such as trailers."""

_LINGER_S: Final = 2.0
"""How long data that the client still sends after the last response is received and discarded."""

_WRITE_TIMEOUT_S: Final = 30.0
"""How long a response waits for a client that does not read it."""

_MAX_PIPELINED: Final = 64
"""Requests that a client may send before it reads the responses. One packet holds thousands of them, but each takes
kilobytes of memory here.
"""

_UPGRADE_HEADERS: Final = frozenset({b"http2-settings", b"upgrade"})
"""The headers of a request for an upgrade, which its `Connection` header also names."""


class _BufferedTransport:
    """A transport that sends everything written in one iteration of the event loop with one system call.

    uvicorn writes the head and the body of a response separately, and each call wakes the client up, which would cost
    a fifth of a small request's time.

    Args:
        transport: the transport of the connection.
        is_receiving: returns whether the client may still be sending. If the connection were closed then, the system
            would reset it, and the response would be lost.
    """

    def __init__(self, transport: asyncio.Transport, is_receiving: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_receiving = is_receiving
        self._loop = asyncio.get_running_loop()
        self._buffer: list[bytes] = []
        self._lingering = False

    def write(self, data: bytes) -> None:
        if self._lingering:
            return
        if not self._buffer:
            self._loop.call_soon(self._flush)
        self._buffer.append(data)

    def is_closing(self) -> bool:
        return self._lingering or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self._flush()
        if self._transport.get_write_buffer_size():  # without a timeout it would close only once all is sent
            self._loop.call_later(_WRITE_TIMEOUT_S, self._transport.abort)
        if not self._is_receiving():
            self._transport.close()
            return
        self._lingering = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._loop.call_later(_LINGER_S, self._transport.close)

    def _flush(self) -> None:
        buffer, self._buffer = self._buffer, []
        if buffer and not self._transport.is_closing():  # it is closing if the client has disconnected
            self._transport.write(b"".join(buffer))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """The protocol of one client connection.

    Args:
        config: uvicorn's configuration, from `uvicorn_config`.
        server_state: uvicorn's state, shared by all connections.
        header_timeout_s: time limit for request headers, from when the connection is opened or from the first byte of
            the request, in seconds.

    Attributes:
        has_received_request: whether at least one request has begun.
    """

    def __init__(self, config: Config, server_state: ServerState, header_timeout_s: float) -> None:
        super().__init__(config, server_state, {IS_DISCONNECTED: self._is_disconnected})
        self.has_received_request = False
        self._header_timeout_s = header_timeout_s
        self._header_bytes = 0
        self._reading_headers = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None

    def idle_s(self) -> float | None:
        """Return the seconds since the last response, or since the connection was opened; None during a request."""
        return None if self._idle_since is None else asyncio.get_running_loop().time() - self._idle_since

    def evictable_s(self) -> float:
        """Return for how many seconds the connection could have been closed without losing a request or response."""
        is_busy = self.transport.get_write_buffer_size() or (self.cycle is not None and self.cycle.more_body)
        return 0.0 if is_busy or self.transport.is_closing() else self.idle_s() or 0.0

    def has_unread_data(self) -> bool:
        """Return whether the socket has received data that was not read yet."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.transport.get_extra_info("socket"), selectors.EVENT_READ)
            return bool(selector.select(0))

    def close(self) -> None:
        """Close the connection after the buffered data is sent."""
        self.transport.close()

    def abort(self) -> None:
        """Close the connection at once. With TLS, `close` waits for the client to confirm, which it can delay."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_BufferedTransport(transport, self._is_receiving))  # type: ignore[arg-type]
        self._idle_since = self.loop.time()
        self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._header_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._header_bytes > _MAX_HEADER_BYTES:
            self._reject_large_headers()
        elif self._reading_headers and self._header_timer is None:  # most headers arrive whole and need no timer
            self._start_header_timer()
        elif self.timeout_keep_alive_task is None and self._header_timer is None and self._idle_since is not None:
            self._start_keep_alive_timer()  # the data was not a request, but an empty line

    def _parse(self, data: bytes) -> None:
        """Feed the parser. An upgrade to another protocol is ignored, and the request handled without it."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("CONNECT is not supported") from None
                data = self._headers_without_upgrade() + data[upgrade.args[0] :]

    def _headers_without_upgrade(self) -> bytes:
        """Return the request line and headers again, for a new parser: after an upgrade, a parser skips the body."""
        request_line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [b"%b: %b" % _without_upgrade(*header) for header in self.headers if header[0] not in _UPGRADE_HEADERS]
        self.parser = httptools.HttpRequestParser(self)
        return b"\r\n".join([request_line, *kept, b"", b""])

    def _should_upgrade(self) -> bool:
        """Tell uvicorn to leave a request for an upgrade alone; `_parse` handles it."""
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(_WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_headers()
        self._cancel_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Reject data that is not HTTP; uvicorn calls this too."""
        self._reject(HTTPStatus.BAD_REQUEST, f"{msg.rstrip('.').lower()}: send HTTP/1.1")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.has_received_request = True
        self._idle_since = None
        self._reading_headers = True

    def on_headers_complete(self) -> None:
        if self._header_bytes > _MAX_HEADER_BYTES and self._header_size() > _MAX_HEADER_BYTES:
            self._reject_large_headers()
            raise ValueError  # stops the parser
        hosts = sum([name == b"host" for name, _ in self.headers])
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):  # RFC 9112, section 3.2
            self._reject(HTTPStatus.BAD_REQUEST, f"the request has {hosts or 'no'} Host headers: send one")
            raise ValueError
        if len(self.pipeline) >= _MAX_PIPELINED:
            problem = f"more than {_MAX_PIPELINED} pipelined requests"
            self._reject(HTTPStatus.TOO_MANY_REQUESTS, f"{problem}: read the responses before you send more")
            raise ValueError
        self._header_bytes = 0
        self._stop_reading_headers()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._header_bytes = 0
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():  # the response came before the body's end
            self.cycle.more_body = False
            self._stop_reading_headers()
            self._start_keep_alive_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()  # uvicorn resumes reading after every response
        if self._reading_headers or not self.cycle.response_complete:
            return
        self._idle_since = self.loop.time()
        if self.cycle.more_body and not self.transport.is_closing():
            self._start_header_timer()  # limits the rest of this body as well as the next headers

    def _is_disconnected(self) -> bool:
        self.flow.resume_reading()  # while reading is paused, the end of the connection may go unnoticed
        return self.transport.is_closing()

    def _is_receiving(self) -> bool:
        cycle = self.cycle
        receiving = self._reading_headers or (cycle is not None and (cycle.more_body or not cycle.response_complete))
        if receiving:
            self.flow.resume_reading()
        return receiving

    def _header_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _start_keep_alive_timer(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self._header_timeout_s, self._on_header_timeout)

    def _stop_reading_headers(self) -> None:
        self._reading_headers = False
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_header_timeout(self) -> None:
        if self._idle_since is None:
            problem = f"the headers were not received within {self._header_timeout_s:g} s"
            self._reject(HTTPStatus.REQUEST_TIMEOUT, f"{problem}: send them faster")
        else:
            self.transport.close()

    def _reject_large_headers(self) -> None:
        problem = f"the headers are over the limit of {_MAX_HEADER_BYTES:,} bytes"
        self._reject(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"{problem}: send fewer or shorter headers")

    def _reject(self, status: HTTPStatus, message: str) -> None:
        """Respond with an error without calling the application, and close the connection."""
        if self.transport.is_closing():
            return
        body = error_body(message)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
        self._stop_reading_headers()


def _without_upgrade(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """Return a header; of `Connection`, without the options of an upgrade."""
    if name == b"connection":
        options = [option.strip() for option in value.split(b",")]
        value = b", ".join(option for option in options if option.lower() not in _UPGRADE_HEADERS)
    return name, value


def uvicorn_config(app: Any, keep_alive_s: float) -> Config:
    """Return uvicorn's configuration for `Connection`, which uses its protocol only: no logs, lifespan or signals."""
    config = Config(
        app,
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
