"""A request as the route handlers see it."""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import parse_qsl

from cifarx_serve.server.errors import ClientDisconnect, RequestError
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.compression import Decompressor
from cifarx_serve.server.settings import Limits

if TYPE_CHECKING:
    from cifarx_serve.server.tracing.request_span import RequestSpan

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Coroutine[Any, Any, Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

IS_DISCONNECTED: Final = "cifarx.is_disconnected"
"""The key in the scope's `state` of a function that returns whether the client has closed the connection.

Calling `receive` would also detect this, but is ten times slower. Other ASGI servers do not set the key.
"""

# An ID is copied into a response header and into the access log, so only visible ASCII characters are accepted.
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")

_RANDOM: Final = random.Random()
"""Generates request IDs, which are not secret; seeded by the operating system in each process."""

_MAX_QUERY_FIELDS: Final = 16
_MAX_LENGTH_DIGITS: Final = 18
_IDENTITY: Final = b"identity"

_DISCARD_TIMEOUT_S: Final = 2.0
"""How long the rest of a body that is too large is received and discarded."""


class Request:
    """A request.

    Args:
        scope: the ASGI connection scope.
        receive: the ASGI receive channel.
        limits: the limits of the server.
        body_budget: the memory for the bodies of all requests.

    Attributes:
        received_at: when the request headers were received, on the clock of `time.perf_counter`.
        id: the `X-Request-ID` of the client if it is valid, otherwise a random one.
        root_path: the prefix under which clients reach the application, such as "/models"; usually empty.
        path: the decoded path, without the root path and the query string.
        path_params: the values of the placeholders of the route's path.
        span: the span of the request, if traces are recorded.
    """

    def __init__(self, scope: Scope, receive: Receive, limits: Limits, body_budget: BodyBudget) -> None:
        self.received_at = time.perf_counter()
        self.scope = scope
        self.method: str = scope["method"]
        self.root_path = ""
        self.path: str = scope["path"]
        if root_path := scope.get("root_path"):
            self.mount(root_path)
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.path_params: dict[str, str] = {}
        self.span: RequestSpan | None = None
        self.limits = limits
        self._receive = receive
        self._body_received = False
        self._body_budget = body_budget
        self._body_bytes = 0
        client_id = self.headers.get(b"x-request-id")
        self.id = (
            client_id.decode() if client_id and _REQUEST_ID.fullmatch(client_id) else f"{_RANDOM.getrandbits(128):032x}"
        )

    def mount(self, root_path: str) -> None:
        """Set the root path, and remove it from the path unless a proxy or the ASGI server has done so."""
        self.root_path = root_path
        full_path: str = self.scope["path"]
        rest = full_path.removeprefix(root_path)
        if rest != full_path and rest[:1] in ("", "/"):
            self.path = rest

    @property
    def content_type(self) -> str:
        """The media type of the body in lower case, without parameters; empty if there is no `Content-Type` header."""
        return self.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()

    def query_params(self) -> dict[str, str]:
        """Return the fields of the query string.

        Raises:
            RequestError: there are too many fields, or one field occurs twice (400).
        """
        raw: bytes = self.scope["query_string"]
        if not raw:
            return {}
        try:
            pairs = parse_qsl(raw.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_QUERY_FIELDS)
        except ValueError as error:
            problem = f"the query string of {len(raw)} bytes has too many fields"
            raise RequestError(HTTPStatus.BAD_REQUEST, problem, f"send at most {_MAX_QUERY_FIELDS}") from error
        params = dict(pairs)
        if len(params) != len(pairs):
            raise RequestError(HTTPStatus.BAD_REQUEST, "a query field occurs twice", "send each field once")
        return params

    async def body(self) -> bytes:
        """Receive and return the whole body.

        Raises:
            RequestError: the body has an encoding that is not supported (415), is too large (413), does not fit into
                the memory for bodies (503), was not received in time (408), or cannot be decompressed (400).
            ClientDisconnect: the client disconnected before the end of the body.
        """
        coding = self.headers.get(b"content-encoding", _IDENTITY)
        try:
            if coding.lower() == _IDENTITY:
                return await self._receive_body()
            return await self._receive_compressed_body(Decompressor(coding, self.limits.max_body_bytes))
        except RequestError as error:
            if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                await self._discard_body()
            raise

    async def _receive_body(self) -> bytes:
        self._check_body_size(self._content_length())
        chunks: list[bytes] = []
        while not self._body_received:
            chunk = await self._receive_chunk()
            self._check_body_size(self._body_bytes + len(chunk))
            self._body_budget.acquire(len(chunk))
            self._body_bytes += len(chunk)
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _receive_compressed_body(self, decompressor: Decompressor) -> bytes:
        self._check_body_size(self._content_length())
        pieces: list[bytes] = []
        received = 0
        while not self._body_received:
            chunk = await self._receive_chunk()
            received += len(chunk)
            self._check_body_size(received)
            async for piece in decompressor.decompress(chunk):
                self._body_budget.acquire(len(piece))
                self._body_bytes += len(piece)
                pieces.append(piece)
        decompressor.require_end()
        return b"".join(pieces)

    def release_body(self) -> None:
        """Return the memory of the body to the budget; called once the handler has finished."""
        self._body_budget.release(self._body_bytes)
        self._body_bytes = 0

    def is_disconnected(self) -> bool:
        """Return whether the client has closed the connection, without waiting. Call it after `body`."""
        is_disconnected: Callable[[], bool] | None = self.scope.get("state", {}).get(IS_DISCONNECTED)
        if is_disconnected is not None:
            return is_disconnected()
        message = self._receive_nowait()
        return message is not None and bool(message["type"] == "http.disconnect")

    async def _discard_body(self) -> None:
        """Receive the rest of the body: closing the connection now would reset it, and the response would be lost."""
        with suppress(TimeoutError, ClientDisconnect, RequestError):
            async with asyncio.timeout(_DISCARD_TIMEOUT_S):
                while not self._body_received:
                    await self._receive_chunk()

    def _receive_nowait(self) -> Message | None:
        """Return the next message, or None if that would require waiting."""
        receiving = self._receive()
        try:
            receiving.send(None)
        except StopIteration as stop:
            message: Message = stop.value
            return message
        receiving.close()
        return None

    async def _receive_chunk(self) -> bytes:
        # A small body arrives with its headers: setting a timer first would cost a thirtieth of the request's time.
        message = self._receive_nowait() or await self._receive_before_timeout()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._body_received = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk

    async def _receive_before_timeout(self) -> Message:
        remaining_s = self.received_at + self.limits.body_timeout_s - time.perf_counter()
        try:
            async with asyncio.timeout(max(0.0, remaining_s)):
                return await self._receive()
        except TimeoutError as error:
            problem = f"the body was not received within {self.limits.body_timeout_s:g} s"
            raise RequestError(HTTPStatus.REQUEST_TIMEOUT, problem, "send it faster, or send less") from error

    def _content_length(self) -> int:
        value = self.headers.get(b"content-length", b"0")
        return int(value) if value.isdigit() and len(value) <= _MAX_LENGTH_DIGITS else 0

    def _check_body_size(self, size: int) -> None:
        limit = self.limits.max_body_bytes
        if size > limit:
            problem = f"the body of {size:,} bytes is over the limit of {limit:,} bytes"
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, "send smaller or fewer images")
