import asyncio
import gzip
import re
import tracemalloc
import zlib
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cifarx_serve.server.errors import ClientDisconnect, RequestError
from cifarx_serve.server.http.body_budget import MAX_BODIES, BodyBudget
from cifarx_serve.server.http.request import IS_DISCONNECTED, Message, Request
from cifarx_serve.server.http.response import json_response
from cifarx_serve.server.settings import Limits

LIMITS = Limits(max_body_bytes=10, body_timeout_s=20.0)


class Connection:
    """What a client sends, in parts; then the client waits, or closes the connection."""

    def __init__(self, *parts: bytes, more: bool = False, closed: bool = False) -> None:
        self.parts = list(parts)
        self.more = more
        self.closed = closed
        self.receives = 0

    async def receive(self) -> Message:
        self.receives += 1
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts) or self.more}
        if not self.closed:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}


def make_request(
    connection: Connection | None = None,
    headers: dict[bytes, bytes] | None = None,
    query: bytes = b"",
    limits: Limits = LIMITS,
    body_budget: BodyBudget | None = None,
) -> Request:
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": query}
    scope["headers"] = list((headers or {}).items())
    return Request(
        scope, (connection or Connection()).receive, limits, body_budget or BodyBudget(limits.max_body_bytes)
    )


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def check_rejected(status: HTTPStatus, request: Request, problem: str) -> None:
    async def test() -> None:
        with pytest.raises(RequestError, match=problem) as raised:
            await request.body()
        assert raised.value.status == status

    run(test)


@pytest.mark.parametrize("client_id", [b"a", b"42-x_Y.z/=+", b"~" * 128])
def test_keeps_a_valid_request_id(client_id: bytes) -> None:
    assert make_request(headers={b"x-request-id": client_id}).id == client_id.decode()


@pytest.mark.parametrize(
    "client_id", [b"", b"two words", b"x" * 129, b"a\r\nset-cookie: b", b"a\n", b"\xff", b"\x00", b"\t"]
)
def test_replaces_an_invalid_request_id(client_id: bytes) -> None:
    first, second = (make_request(headers={b"x-request-id": client_id}).id for _ in range(2))
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first != second


@pytest.mark.parametrize(
    ("header", "content_type"),
    [
        (b"image/png", "image/png"),
        (b"Multipart/Form-Data; boundary=X", "multipart/form-data"),
        (b" image/PNG ;a=b", "image/png"),
        (b"\xff", "ÿ"),
    ],
)
def test_content_type_excludes_parameters(header: bytes, content_type: str) -> None:
    assert make_request(headers={b"content-type": header}).content_type == content_type
    assert make_request().content_type == ""


def test_query_params() -> None:
    assert make_request(query=b"").query_params() == {}
    assert make_request(query=b"model=a%20b&top_k=&c=%C3%A9%ff+").query_params() == {
        "model": "a b",
        "top_k": "",
        "c": "é\ufffd ",
    }


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        (b"top_k=1&top_k=2", "a query field occurs twice: send each field once"),
        (b"&".join([b"a=1"] * 17), "the query string of 67 bytes has too many fields: send at most 16"),
    ],
)
def test_rejects_a_query(query: bytes, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as raised:
        make_request(query=query).query_params()
    assert raised.value.status == HTTPStatus.BAD_REQUEST


@given(st.binary(max_size=60))
@example(b"%ed%a0%80=1")
def test_parses_or_rejects_any_query(query: bytes) -> None:
    try:
        params = make_request(query=query).query_params()
    except RequestError as error:
        assert error.status == HTTPStatus.BAD_REQUEST
    else:
        assert all(json_response({name: value}).body for name, value in params.items())


@pytest.mark.parametrize("parts", [[b""], [b"0123456789"], [b"01", b"", b"23456789"], [b"", b"x"]])
def test_joins_the_parts_of_a_body(parts: list[bytes]) -> None:
    async def test() -> None:
        assert await make_request(Connection(*parts)).body() == b"".join(parts)

    run(test)


def test_accepts_a_message_without_optional_keys() -> None:
    async def receive() -> Message:
        return {"type": "http.request"}

    async def test() -> None:
        request = Request(
            {"type": "http", "method": "POST", "path": "/", "headers": []},
            receive,
            LIMITS,
            BodyBudget(LIMITS.max_body_bytes),
        )
        assert await request.body() == b""

    run(test)


def test_rejects_a_content_length_over_the_limit() -> None:
    """The body is received and discarded, so that the client gets the response."""
    connection = Connection(*[b"x" * 9] * 3)
    check_rejected(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        make_request(connection, {b"content-length": b"27"}),
        "the body of 27 bytes is over the limit of 10 bytes: send smaller or fewer images",
    )
    assert connection.receives == 3


def test_rejects_a_body_over_the_limit_without_content_length() -> None:
    connection = Connection(*[b"x" * 6] * 5)
    check_rejected(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        make_request(connection),
        "the body of 12 bytes is over the limit of 10 bytes",
    )
    assert connection.receives == 5


@pytest.mark.parametrize("parts", [[b"x" * 11], [b"x" * 6, b"x" * 5]], ids=["one part", "two parts"])
def test_discards_no_more_than_the_body(parts: list[bytes]) -> None:
    connection = Connection(*parts)
    check_rejected(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        make_request(connection),
        "the body of 11 bytes is over the limit of 10 bytes",
    )
    assert connection.receives == len(parts)


def test_rejects_a_large_body_of_a_client_that_disconnects() -> None:
    connection = Connection(b"x" * 6, b"x" * 5, more=True, closed=True)
    check_rejected(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        make_request(connection),
        "the body of 11 bytes is over the limit of 10 bytes",
    )


@pytest.mark.parametrize("size", [1, 7, 1000], ids="{}-byte chunks".format)
@pytest.mark.parametrize("coding", [b"identity", b"Identity", b"gzip", b"GZIP", b"deflate"])
def test_returns_a_compressed_body(coding: bytes, size: int) -> None:
    body = b"0123456789"
    sent = {b"gzip": gzip.compress(body), b"deflate": zlib.compress(body)}.get(coding.lower(), body)
    parts = [sent[start : start + size] for start in range(0, len(sent), size)]

    async def test() -> None:
        budget = BodyBudget(100)
        limits = Limits(max_body_bytes=100)
        request = make_request(Connection(*parts), {b"content-encoding": coding}, limits=limits, body_budget=budget)
        assert await request.body() == body
        request.release_body()
        budget.acquire(MAX_BODIES * 100)  # all of it has been returned

    run(test)


@pytest.mark.parametrize("coding", [b"br", b"zstd", b"gzip, gzip", b"x-gzip", b""])
def test_rejects_a_body_with_another_encoding(coding: bytes) -> None:
    problem = f"the body has the encoding {coding.decode()!r}: send it with Content-Encoding gzip or deflate, or"
    request = make_request(Connection(b"x"), {b"content-encoding": coding})
    check_rejected(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, request, re.escape(problem))


@pytest.mark.parametrize("split", [False, True], ids=["one part", "two parts"])
@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (
            b"text",
            r"the body is not valid gzip \(Error -3 .*: incorrect header check\): compress all of it",
        ),
        (gzip.compress(b"x")[:-1], r"\(its end is missing\)"),
        (gzip.compress(b"x")[:-6] + bytes(6), "incorrect data check"),
        (gzip.compress(b"x") + b"more", r"\([134] bytes follow its end\)"),
        (gzip.compress(b"x") * 2, r"bytes follow its end"),
        (b"", r"\(its end is missing\)"),
    ],
    ids=["no gzip", "one byte less", "wrong checksum", "bytes after it", "two members", "nothing"],  # gzip has the time
)
def test_rejects_a_body_that_cannot_be_decompressed(sent: bytes, problem: str, split: bool) -> None:
    parts = [sent[:-1], sent[-1:]] if split else [sent]
    request = make_request(Connection(*parts), {b"content-encoding": b"gzip"}, limits=Limits())
    check_rejected(HTTPStatus.BAD_REQUEST, request, problem)


def test_rejects_a_compressed_body_that_grows_over_the_limit() -> None:
    """No more is decompressed than the limit, so that 100 KB do not take the time and the memory of 100 MB."""
    limits = Limits(max_body_bytes=1 << 20)
    for size, is_accepted in [(1 << 20, True), ((1 << 20) + 1, False), (100 << 20, False)]:
        sent = zlib.compress(bytes(size), 1 if size > 1 << 21 else 9)
        request = make_request(Connection(sent), {b"content-encoding": b"deflate"}, limits=limits)
        if is_accepted:
            assert asyncio.run(request.body()) == bytes(size)
            continue
        tracemalloc.start()
        problem = "the decompressed body is over the limit of 1,048,576 bytes: send smaller or fewer images"
        check_rejected(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, request, problem)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_rejects_a_compressed_body_that_is_sent_over_the_limit() -> None:
    request = make_request(Connection(b"x" * 11), {b"content-encoding": b"gzip"})
    check_rejected(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, request, "the body of 11 bytes is over the limit of 10 bytes")


@pytest.mark.parametrize("content_length", [b"", b"-1", b"1e9", b"9" * 30, b"\xb2"])
def test_ignores_an_invalid_content_length(content_length: bytes) -> None:
    async def test() -> None:
        assert await make_request(Connection(b"x"), {b"content-length": content_length}).body() == b"x"

    run(test)


@pytest.mark.parametrize("parts", [[], [b"x"]], ids=["nothing", "a part"])
def test_rejects_a_slow_body(parts: list[bytes]) -> None:
    limits = Limits(body_timeout_s=0.05)
    request = make_request(Connection(*parts, more=True), limits=limits)
    problem = r"the body was not received within 0\.05 s: send it faster, or send less"
    check_rejected(HTTPStatus.REQUEST_TIMEOUT, request, problem)


def test_raises_client_disconnect_before_the_end_of_the_body() -> None:
    async def test() -> None:
        for parts in ([], [b"x"]):
            with pytest.raises(ClientDisconnect):
                await make_request(Connection(*parts, more=True, closed=True)).body()

    run(test)


def test_is_disconnected_does_not_wait() -> None:
    async def test() -> None:
        connection = Connection(b"x")
        request = make_request(connection)
        await request.body()
        assert not request.is_disconnected()
        assert not request.is_disconnected()
        connection.closed = True
        assert request.is_disconnected()

    run(test)


def test_is_disconnected_asks_the_server_first() -> None:
    async def test() -> None:
        connection = Connection(b"x")
        request = make_request(connection)
        await request.body()
        disconnected = False
        request.scope["state"] = {IS_DISCONNECTED: lambda: disconnected}
        assert not request.is_disconnected()
        disconnected = True
        assert request.is_disconnected()
        assert connection.receives == 1

    run(test)


def test_json_response_encodes_nan_and_infinity_as_null() -> None:
    response = json_response({"score": float("nan"), "other": float("inf")}, HTTPStatus.NOT_FOUND)
    assert response.body == b'{"score":null,"other":null}'
    assert (response.status, response.content_type) == (404, b"application/json")
