"""A request as the routes see it, and what they answer."""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from concurrent.futures import Executor
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar
from urllib.parse import parse_qsl

import msgspec

from cifarx_serve.server.errors import ClientDisconnect, RequestError
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.settings import Limits

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Coroutine[Any, Any, Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

JSON: Final = b"application/json"

IS_DISCONNECTED: Final = "cifarx.is_disconnected"
"""In the scope's `state`, where the server has it: a function that says whether the client has closed the connection.

A message that has come says so too, but asking for one takes ten times as long.
"""

Given = TypeVar("Given")

# What is echoed into a header and a log line: visible ASCII.
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")

_RANDOM: Final = random.Random()
"""For ids, which are no secrets; seeded by the system, a process each."""

_MAX_FIELDS: Final = 16
_LENGTH_DIGITS: Final = 18
_PLAIN: Final = ((b"accept-encoding", b"identity"),)

_READ_OFF_S: Final = 2.0
"""How long a body that is too large is read and thrown away."""


class Response(NamedTuple):
    """What a route answers."""

    body: bytes
    status: int = HTTPStatus.OK
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


def json_response(value: Any, status: int = HTTPStatus.OK) -> Response:
    """A value as one JSON document; numbers that are not finite become null."""
    return Response(msgspec.json.encode(value), status)


class Request:
    """One request.

    Attributes:
        arrived: when its head did, by `time.perf_counter`.
        id: the client's own, where it gave a sound one.
        path: decoded; without the query.
        parameters: what the route's pattern found in the path.
    """

    def __init__(self, scope: Scope, receive: Receive, limits: Limits, held: BodyBudget) -> None:
        self.arrived = time.perf_counter()
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.parameters: dict[str, str] = {}
        self.limits = limits
        self._receive = receive
        self._ended = False
        self._held = held
        self._held_bytes = 0
        given = self.headers.get(b"x-request-id")
        self.id = given.decode() if given and _REQUEST_ID.fullmatch(given) else f"{_RANDOM.getrandbits(128):032x}"

    @property
    def content_type(self) -> str:
        """Of the body, without its parameters, in small letters; empty where it says none."""
        return self.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()

    def query(self) -> dict[str, str]:
        """The fields of the query.

        Raises:
            RequestError: too many, or one twice.
        """
        raw: bytes = self.scope["query_string"]
        if not raw:
            return {}
        try:
            pairs = parse_qsl(raw.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_FIELDS)
        except ValueError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"a query of {len(raw)} bytes", "give few fields") from error
        found = dict(pairs)
        if len(found) != len(pairs):
            raise RequestError(HTTPStatus.BAD_REQUEST, "a field of the query is given twice", "give each once")
        return found

    async def body(self) -> bytes:
        """All of it.

        Raises:
            RequestError: compressed (415), too large (413), too much beside those of others (503), or it did not come
                in time (408).
            ClientDisconnect: the client closed before its end.
        """
        coding = self.headers.get(b"content-encoding", b"identity")
        if coding.lower() != b"identity":
            problem = f"a body in the encoding {coding[:20].decode('latin-1')!r}"
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem, "send it without Content-Encoding", _PLAIN)
        try:
            return await self._whole()
        except RequestError as error:
            if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                await self._read_off()
            raise

    async def _whole(self) -> bytes:
        self._require_size(self._stated_size())
        parts: list[bytes] = []
        while not self._ended:
            part = await self._next_part()
            self._require_size(self._held_bytes + len(part))
            self._held.take(len(part))
            self._held_bytes += len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Once it is answered its body is held no more."""
        self._held.give_back(self._held_bytes)
        self._held_bytes = 0

    async def run_in_threadpool(self, pool: Executor, function: Callable[..., Given], *arguments: Any) -> Given:
        """What a function gives that would keep the event loop from others.

        Raises:
            RequestError: the deadline has passed (504); or what the function raises.
        """
        deadline_s = self.limits.deadline_s
        left_s = self.arrived + deadline_s - time.perf_counter()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)
        except TimeoutError as error:
            problem = f"no answer within {deadline_s:g} s"
            raise RequestError(HTTPStatus.GATEWAY_TIMEOUT, problem, "try again when there is less load") from error

    def is_disconnected(self) -> bool:
        """Whether the client has closed the connection; asked once the body is read, without waiting."""
        is_disconnected: Callable[[], bool] | None = self.scope.get("state", {}).get(IS_DISCONNECTED)
        if is_disconnected is not None:
            return is_disconnected()
        message = self._at_once()
        return message is not None and bool(message["type"] == "http.disconnect")

    async def _read_off(self) -> None:
        """A client that is still sending would not hear the answer: its connection would be reset."""
        with suppress(TimeoutError, ClientDisconnect, RequestError):
            async with asyncio.timeout(_READ_OFF_S):
                while not self._ended:
                    await self._next_part()

    def _at_once(self) -> Message | None:
        """What there is to receive without waiting, if anything."""
        waiting = self._receive()
        try:
            waiting.send(None)
        except StopIteration as ended:
            message: Message = ended.value
            return message
        waiting.close()
        return None

    async def _next_part(self) -> bytes:
        # A small body is there with its head: a timer that is not needed would be a thirtieth of the request's time.
        message = self._at_once() or await self._awaited()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._ended = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    async def _awaited(self) -> Message:
        left_s = self.arrived + self.limits.body_timeout_s - time.perf_counter()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                return await self._receive()
        except TimeoutError as error:
            problem = f"the body did not come within {self.limits.body_timeout_s:g} s"
            raise RequestError(HTTPStatus.REQUEST_TIMEOUT, problem, "send it faster, or send less") from error

    def _stated_size(self) -> int:
        stated = self.headers.get(b"content-length", b"0")
        return int(stated) if stated.isdigit() and len(stated) <= _LENGTH_DIGITS else 0

    def _require_size(self, size: int) -> None:
        limit = self.limits.max_body_bytes
        if size > limit:
            problem = f"a body of {size:,} bytes, over the limit of {limit:,}"
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, "send smaller or fewer images")
