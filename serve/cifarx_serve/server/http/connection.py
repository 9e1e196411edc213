"""One connection of a client: uvicorn's, with limits on how long and how large a request's head may be."""

import asyncio
import selectors
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cifarx_serve.server.asgi import error_body
from cifarx_serve.server.http.request import IS_DISCONNECTED

_MAX_HEAD: Final = 64 * 1024
"""Bytes of a request's first line and headers, and of whatever else is not its body."""

_LINGER_S: Final = 2.0
"""How long what a client still sends after its last answer is read and thrown away."""

_UNREAD_S: Final = 30.0
"""How long an answer waits for a client that does not read it."""

_MAX_PIPELINED: Final = 64
"""Requests that a client may send ahead of the answers: a packet holds thousands, each of kilobytes here."""

_OF_UPGRADES: Final = frozenset({b"connection", b"http2-settings", b"upgrade"})


class _Transport:
    """A transport that sends what is written in one turn of the event loop by one system call.

    uvicorn writes an answer's head and body apart, and each call wakes the client: a fifth of a small request's time.

    Args:
        transport: the connection's.
        is_receiving: whether the client may be sending. Were the connection closed then, the system would reset it,
            and the answer would be lost on its way.
    """

    def __init__(self, transport: asyncio.Transport, is_receiving: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_receiving = is_receiving
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._lingers = False

    def write(self, data: bytes) -> None:
        if self._lingers:
            return
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self._flush()
        if self._transport.get_write_buffer_size():  # else it would be closed when all is read
            self._loop.call_later(_UNREAD_S, self._transport.abort)
        if not self._is_receiving():
            self._transport.close()
            return
        self._lingers = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._loop.call_later(_LINGER_S, self._transport.close)

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held and not self._transport.is_closing():  # else the client has left
            self._transport.write(b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """Args are uvicorn's.

    Args:
        header_timeout_s: from the opening of the connection, or from a request's first byte, to the end of its head.
    """

    def __init__(self, config: Config, server_state: ServerState, header_timeout_s: float) -> None:
        super().__init__(config, server_state, {IS_DISCONNECTED: self._is_disconnected})
        self._header_timeout_s = header_timeout_s
        self._in_head = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread = 0
        self._unread_timer: asyncio.TimerHandle | None = None
        self._opened = False
        self._quiet_since: float | None = None

    def quiet_s(self) -> float | None:
        """Seconds since its last request was answered, or since it was opened; None while one is under way."""
        return None if self._quiet_since is None else asyncio.get_running_loop().time() - self._quiet_since

    @property
    def asked(self) -> bool:
        """Whether it ever had a request."""
        return self._opened

    def spare_s(self) -> float:
        """Seconds for which it could have been dropped without a loss; 0 where a request or an answer is under way."""
        owed = self.transport.get_write_buffer_size() or (self.cycle is not None and self.cycle.more_body)
        return 0.0 if owed or self.transport.is_closing() else self.quiet_s() or 0.0

    def has_unread(self) -> bool:
        """Whether something has come that was not read yet."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.transport.get_extra_info("socket"), selectors.EVENT_READ)
            return bool(selector.select(0))

    def end(self) -> None:
        """Close it; for one that is quiet."""
        self.transport.close()

    def drop(self) -> None:
        """Close it without a farewell, which the other side of TLS could draw out; for one that is to spare."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self._is_receiving))  # type: ignore[arg-type]
        self._quiet_since = self.loop.time()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unread += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._unread > _MAX_HEAD:
            self._refuse_head()
        elif self._in_head and self._head_timer is None:  # most heads come whole, and need none
            self._await_head()
        elif self.timeout_keep_alive_task is None and self._head_timer is None and self._quiet_since is not None:
            self._await_next()  # what came was no request: an empty line

    def _parse(self, data: bytes) -> None:
        """A request that asks for another protocol is answered as if it had not."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("no proxy") from None
                data = self._head_without_upgrade() + data[upgrade.args[0] :]

    def _head_without_upgrade(self) -> bytes:
        """The head once more, for a new parser: one that has seen an upgrade passes over the body."""
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [b"%b: %b" % header for header in self.headers if header[0] not in _OF_UPGRADES]
        self.parser = httptools.HttpRequestParser(self)
        return b"\r\n".join([first, *kept, b"connection: close", b"", b""])

    def _should_upgrade(self) -> bool:
        """Asked by uvicorn of a request that wants to; it is then left to `_parse`."""
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(_UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_unread()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP; called by uvicorn."""
        self._refuse(HTTPStatus.BAD_REQUEST, f"{msg.rstrip('.').lower()}: send HTTP/1.1")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._opened = True
        self._quiet_since = None
        self._in_head = True

    def on_headers_complete(self) -> None:
        if self._unread > _MAX_HEAD and self._head_size() > _MAX_HEAD:
            self._refuse_head()
            raise ValueError  # parse no more of it
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._refuse(HTTPStatus.TOO_MANY_REQUESTS, f"over {_MAX_PIPELINED} requests at a time: wait for answers")
            raise ValueError
        self._unread = 0
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._unread = 0
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():  # it was answered before its end
            self.cycle.more_body = False
            self._end_head()
            self._await_next()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()  # uvicorn reads on after every answer
        if self._in_head or not self.cycle.response_complete:
            return
        self._quiet_since = self.loop.time()
        if self.cycle.more_body and not self.transport.is_closing():
            self._await_head()  # and the rest of this body before it

    def _is_disconnected(self) -> bool:
        self.flow.resume_reading()  # else that it closes may not be heard
        return self.transport.is_closing()

    def _is_receiving(self) -> bool:
        cycle = self.cycle
        receiving = self._in_head or (cycle is not None and (cycle.more_body or not cycle.response_complete))
        if receiving:
            self.flow.resume_reading()
        return receiving

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _await_next(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _end_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._header_timeout_s, self._late)

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        if self._quiet_since is None:
            problem = f"the head of the request did not come within {self._header_timeout_s:g} s: send it faster"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, problem)
        else:
            self.transport.close()

    def _refuse_head(self) -> None:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        self._refuse(status, f"a head of over {_MAX_HEAD:,} bytes: send fewer or shorter headers")

    def _refuse(self, status: HTTPStatus, problem: str) -> None:
        """Answer without the application, and close."""
        if self.transport.is_closing():
            return
        body = error_body(problem)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
        self._end_head()


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
