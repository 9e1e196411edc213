import asyncio
import re
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cifarx_serve.server.errors import ClientDisconnect, RequestError
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.request import IS_DISCONNECTED, Message, Request, json_response
from cifarx_serve.server.settings import Limits

LIMITS = Limits(max_body_bytes=10, body_timeout_s=20.0)


class Connection:
    """What a client sends, part by part; then it waits, or is closed."""

    def __init__(self, *parts: bytes, more: bool = False, closed: bool = False) -> None:
        self.parts = list(parts)
        self.more = more
        self.closed = closed
        self.asked = 0

    async def receive(self) -> Message:
        self.asked += 1
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts) or self.more}
        if not self.closed:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}


def made(
    connection: Connection | None = None,
    headers: dict[bytes, bytes] | None = None,
    query: bytes = b"",
    limits: Limits = LIMITS,
) -> Request:
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": query}
    scope["headers"] = list((headers or {}).items())
    return Request(scope, (connection or Connection()).receive, limits, BodyBudget(limits.max_body_bytes))


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def refused(status: HTTPStatus, request: Request, problem: str) -> None:
    async def test() -> None:
        with pytest.raises(RequestError, match=problem) as error:
            await request.body()
        assert error.value.status == status

    run(test)


@pytest.mark.parametrize("given_id", [b"a", b"42-x_Y.z/=+", b"~" * 128])
def test_a_sound_id_is_the_clients(given_id: bytes) -> None:
    assert made(headers={b"x-request-id": given_id}).id == given_id.decode()


@pytest.mark.parametrize(
    "given_id", [b"", b"two words", b"x" * 129, b"a\r\nset-cookie: b", b"a\n", b"\xff", b"\x00", b"\t"]
)
def test_any_other_is_replaced(given_id: bytes) -> None:
    first, second = (made(headers={b"x-request-id": given_id}).id for _ in range(2))
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first != second


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (b"image/png", "image/png"),
        (b"Multipart/Form-Data; boundary=X", "multipart/form-data"),
        (b" image/PNG ;a=b", "image/png"),
        (b"\xff", "ÿ"),
    ],
)
def test_the_content_type_is_without_its_parameters(header: bytes, kind: str) -> None:
    assert made(headers={b"content-type": header}).content_type == kind
    assert made().content_type == ""


def test_the_fields_of_a_query() -> None:
    assert made(query=b"").query() == {}
    assert made(query=b"model=a%20b&top_k=&c=%C3%A9%ff+").query() == {"model": "a b", "top_k": "", "c": "é\ufffd "}


@pytest.mark.parametrize(
    ("query", "problem"),
    [(b"top_k=1&top_k=2", "a field of the query is given twice"), (b"&".join([b"a=1"] * 17), "a query of 67 bytes")],
)
def test_a_query_that_is_refused(query: bytes, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as error:
        made(query=query).query()
    assert error.value.status == HTTPStatus.BAD_REQUEST


@given(st.binary(max_size=60))
@example(b"%ed%a0%80=1")
def test_any_query_is_read_or_refused(query: bytes) -> None:
    try:
        fields = made(query=query).query()
    except RequestError as error:
        assert error.status == HTTPStatus.BAD_REQUEST
    else:
        assert all(json_response({name: value}).body for name, value in fields.items())


@pytest.mark.parametrize("parts", [[b""], [b"0123456789"], [b"01", b"", b"23456789"], [b"", b"x"]])
def test_a_body_is_put_together(parts: list[bytes]) -> None:
    async def test() -> None:
        assert await made(Connection(*parts)).body() == b"".join(parts)

    run(test)


def test_a_message_may_leave_out_what_it_need_not_say() -> None:
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


def test_a_body_that_says_it_is_too_large_is_not_kept() -> None:
    """It is read off all the same, so that the client hears the answer."""
    connection = Connection(*[b"x" * 9] * 3)
    refused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        made(connection, {b"content-length": b"27"}),
        "a body of 27 bytes, over the limit of 10: send smaller or fewer images",
    )
    assert connection.asked == 3


def test_a_body_that_does_not_say_so_is_stopped_at_the_limit() -> None:
    connection = Connection(*[b"x" * 6] * 5)
    refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, made(connection), "a body of 12 bytes")
    assert connection.asked == 5


@pytest.mark.parametrize("parts", [[b"x" * 11], [b"x" * 6, b"x" * 5]], ids=["one part", "two parts"])
def test_what_is_whole_is_not_waited_for(parts: list[bytes]) -> None:
    connection = Connection(*parts)
    refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, made(connection), "a body of 11 bytes")
    assert connection.asked == len(parts)


def test_a_large_body_whose_client_leaves_is_still_refused() -> None:
    connection = Connection(b"x" * 6, b"x" * 5, more=True, closed=True)
    refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, made(connection), "a body of 11 bytes")


def test_a_compressed_body_is_refused() -> None:
    async def test() -> None:
        for coding in (b"identity", b"Identity"):
            assert await made(Connection(b"x"), {b"content-encoding": coding}).body() == b"x"

    run(test)
    request = made(Connection(b"x"), {b"content-encoding": b"gzip"})
    refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, request, "encoding 'gzip': send it without Content-Encoding")


def test_what_takes_long_is_given_up_at_the_deadline() -> None:
    async def test() -> None:
        free = threading.Event()
        request = made(limits=Limits(deadline_s=0.05))
        with ThreadPoolExecutor(1) as pool:
            assert await request.run_in_threadpool(pool, max, 3, 4) == 4
            with pytest.raises(RequestError, match=r"no answer within 0\.05 s") as late:
                await request.run_in_threadpool(pool, free.wait)
            free.set()
        assert late.value.status == HTTPStatus.GATEWAY_TIMEOUT

    run(test)


@pytest.mark.parametrize("stated", [b"", b"-1", b"1e9", b"9" * 30, b"\xb2"])
def test_a_length_that_means_nothing_says_nothing(stated: bytes) -> None:
    async def test() -> None:
        assert await made(Connection(b"x"), {b"content-length": stated}).body() == b"x"

    run(test)


@pytest.mark.parametrize("parts", [[], [b"x"]], ids=["nothing", "a part"])
def test_a_slow_body_is_given_up(parts: list[bytes]) -> None:
    limits = Limits(body_timeout_s=0.05)
    request = made(Connection(*parts, more=True), limits=limits)
    refused(HTTPStatus.REQUEST_TIMEOUT, request, r"the body did not come within 0\.05 s: send it faster")


def test_a_client_that_closes_before_the_bodys_end_has_left() -> None:
    async def test() -> None:
        for parts in ([], [b"x"]):
            with pytest.raises(ClientDisconnect):
                await made(Connection(*parts, more=True, closed=True)).body()

    run(test)


def test_whether_a_client_has_left_is_known_without_waiting() -> None:
    async def test() -> None:
        connection = Connection(b"x")
        request = made(connection)
        await request.body()
        assert not request.is_disconnected()
        assert not request.is_disconnected()
        connection.closed = True
        assert request.is_disconnected()

    run(test)


def test_a_server_that_knows_who_has_left_is_believed() -> None:
    async def test() -> None:
        connection = Connection(b"x")
        request = made(connection)
        await request.body()
        left = False
        request.scope["state"] = {IS_DISCONNECTED: lambda: left}
        assert not request.is_disconnected()
        left = True
        assert request.is_disconnected()
        assert connection.asked == 1

    run(test)


def test_numbers_that_are_not_finite_are_null() -> None:
    response = json_response({"score": float("nan"), "other": float("inf")}, HTTPStatus.NOT_FOUND)
    assert response.body == b'{"score":null,"other":null}'
    assert (response.status, response.content_type) == (404, b"application/json")
