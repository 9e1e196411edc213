"""What holds for every request, with routes of the test's own."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cifarx_serve.server.asgi import Route
from cifarx_serve.server.errors import CAUSES, ClientDisconnect, RequestError
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.request import Request, Response
from tests.support.asked import Client, application


async def echo(request: Request) -> Response:
    return Response(json.dumps([request.path, request.parameters]).encode(), headers=((b"x-own", b"1"),))


async def refuse(request: Request) -> Response:
    raise RequestError(HTTPStatus(int(request.parameters["status"])), "what was wrong", "how to mend it")


async def break_down(_: Request) -> Response:
    raise ZeroDivisionError("secret of the server")


async def leave(_: Request) -> Response:
    raise ClientDisconnect


ROUTES = [
    Route("GET", "/thing", echo),
    Route("POST", "/thing", echo),
    Route("POST", "/only/{name}", echo),
    Route("GET", "/things/{name}", echo),
    Route("GET", "/things/{name}/parts/{part}", echo),
    Route("GET", "/open", echo, open=True),
    Route("GET", "/refuse/{status}", refuse, open=True),
    Route("GET", "/break", break_down, open=True),
    Route("GET", "/leave", leave, open=True),
]


def ask(test: Callable[[Client], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with application({}, routes=ROUTES, **options) as client:
            await test(client)

    asyncio.run(run())


def figures(client: Client) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(client.metrics.page().decode())
        for sample in family.samples
        if sample.name.endswith("_total")
    }


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/thing", {}),
        ("/things/a", {"name": "a"}),
        ("/things/a b.é%", {"name": "a b.é%"}),
        ("/things/a/parts/1", {"name": "a", "part": "1"}),
    ],
)
def test_a_path_is_answered_by_its_route(path: str, parameters: dict[str, str]) -> None:
    async def test(client: Client) -> None:
        answer = await client.get(path)
        assert (answer.status, answer.json) == (200, [path, parameters])
        assert answer.headers["x-own"] == "1"

    ask(test)


@pytest.mark.parametrize(
    "path", ["/", "", "/Thing", "/thing/", "/things", "/things/", "/things/a/b", "//thing", "*", "/things/a/parts/"]
)
def test_there_is_no_other_path(path: str) -> None:
    async def test(client: Client) -> None:
        answer = await client.get(path)
        assert answer.status == 404
        assert answer.error == f"no path {path!r}: see /docs for those that there are"

    ask(test)


def test_an_error_tells_no_more_of_a_path_than_can_be_read() -> None:
    async def test(client: Client) -> None:
        answer = await client.get("/" + "x" * 10_000 + "<script>")
        assert len(answer.body) < 200
        assert answer.headers["content-type"] == "application/json"

    ask(test)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/thing", "GET, HEAD, POST"),
        ("GET", "/only/a", "POST"),
        ("HEAD", "/only/a", "POST"),
        ("POST", "/open", "GET, HEAD"),
        ("OPTIONS", "/open", "GET, HEAD"),
    ],
)
def test_another_method_is_told_which_there_are(method: str, path: str, allow: str) -> None:
    async def test(client: Client) -> None:
        answer = await client.ask(method, path)
        assert (answer.status, answer.headers["allow"]) == (405, allow)
        assert answer.error == f"{method} of this path: it has {allow}"

    ask(test)


def test_head_is_answered_as_get() -> None:
    """The server leaves the body out."""

    async def test(client: Client) -> None:
        get, head = await client.get("/thing"), await client.ask("HEAD", "/thing")
        assert (head.status, head.headers["content-length"]) == (200, get.headers["content-length"])

    ask(test)


@pytest.mark.parametrize("path", ["/thing", "/absent", "/break", "/refuse/503", "/refuse/413"])
def test_every_answer_has_its_id_and_its_security_headers(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    async def test(client: Client) -> None:
        answer = await client.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert len(answer.headers["x-request-id"]) == 32
        assert not [name for name in answer.headers if name.startswith("access-control")]
        mine = await client.get(path, x_request_id="my-own/42")
        assert mine.headers["x-request-id"] == "my-own/42"
        other = await client.get(path, x_request_id="no\r\nsound id")
        assert len(other.headers["x-request-id"]) == 32

    ask(test)
    capfd.readouterr()


@pytest.mark.parametrize("status", sorted(CAUSES))
def test_an_error_is_json_with_its_status(status: HTTPStatus) -> None:
    async def test(client: Client) -> None:
        answer = await client.get(f"/refuse/{status:d}")
        assert answer.status == status
        assert answer.error == "what was wrong: how to mend it"
        assert answer.headers.get("retry-after") == ("1" if status == 503 else None)
        assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
        assert answer.headers.get("connection") == ("close" if status in (408, 413) else None)
        assert figures(client)["cifarx_errors_total", CAUSES[status]] == 1

    ask(test)


def test_a_defect_is_told_to_who_runs_the_server_alone(capfd: pytest.CaptureFixture[str]) -> None:
    async def test(client: Client) -> None:
        answer = await client.get("/break")
        assert answer.status == 500
        assert answer.error == "a defect of the server: its log has more"
        assert figures(client)["cifarx_requests_total", "/break", "500"] == 1
        assert (await client.get("/thing")).status == 200

    ask(test)
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert "ZeroDivisionError: secret of the server" in told
    assert "break_down" in told


def test_nothing_is_sent_to_a_client_that_left() -> None:
    file = io.BytesIO()

    async def test(client: Client) -> None:
        client.left.set()
        with pytest.raises(ValueError, match="unpack"):
            await client.get("/leave")
        assert client.sent == []
        assert figures(client)["cifarx_errors_total", "client_left"] == 1

    async def run() -> None:
        log = AccessLog(file)
        async with application({}, routes=ROUTES, log=log) as client:
            await test(client)
        log.flush()

    asyncio.run(run())
    assert json.loads(file.getvalue())["status"] == 499


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("secret\n")
    return path


def test_what_is_not_open_needs_a_key(keys: Path) -> None:
    async def test(client: Client) -> None:
        refused = await client.get("/thing")
        assert refused.status == 401
        assert refused.error == "no API key, or a wrong one: send Authorization: Bearer KEY"
        assert refused.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/things/a", x_api_key="wrong")).status == 401
        assert (await client.ask("HEAD", "/thing")).status == 401
        assert (await client.get("/open")).status == 200
        assert (await client.get("/thing", x_api_key="secret")).status == 200
        assert (await client.get("/things/a", authorization="Bearer secret")).status == 200
        assert (await client.get("/absent")).status == 404

    ask(test, keys=keys)


def test_a_browser_may_ask_from_the_origin_that_was_named(keys: Path) -> None:
    async def test(client: Client) -> None:
        headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
        preflight = await client.ask("OPTIONS", "/thing", headers=headers)
        assert (preflight.status, preflight.body) == (204, b"")
        assert preflight.headers["access-control-allow-origin"] == "https://example.org"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        for name in ("authorization", "content-type", "x-api-key"):
            assert name in preflight.headers["access-control-allow-headers"]
        for answer in (
            await client.get("/thing", x_api_key="secret"),
            await client.get("/thing"),
            await client.get("/x"),
        ):
            assert answer.headers["access-control-allow-origin"] == "https://example.org"
            assert answer.headers["vary"] == "origin"
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert (await client.ask("OPTIONS", "/absent", headers=headers)).status == 404

    ask(test, keys=keys, cors_origin="https://example.org")


def test_while_it_drains_connections_are_closed() -> None:
    async def test(client: Client) -> None:
        assert "connection" not in (await client.get("/thing")).headers
        client.service.draining = True
        assert (await client.get("/thing")).headers["connection"] == "close"

    ask(test)


def test_every_request_is_a_line_of_the_log_and_in_the_figures(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()

    async def run() -> None:
        log = AccessLog(file)
        async with application({}, routes=ROUTES, log=log) as client:
            await client.get("/things/a?secret=1", x_request_id="mine")
            await client.ask("POST", "/absent")
            await client.get("/break")
            await client.ask("DELETE", "/thing")
            found = figures(client)
        log.flush()
        assert found["cifarx_requests_total", "/things/{name}", "200"] == 1
        assert found["cifarx_requests_total", "unknown", "404"] == 1
        assert found["cifarx_requests_total", "/thing", "405"] == 1
        assert found["cifarx_errors_total", "internal"] == 1

    asyncio.run(run())
    good, absent, broken, _ = map(json.loads, file.getvalue().splitlines())
    assert {
        "id": "mine",
        "client": "127.0.0.1",
        "method": "GET",
        "path": "/things/a",
        "status": 200,
    }.items() <= good.items()
    assert good["bytes"] == len('["/things/a", {"name": "a"}]')
    assert good["ms"] >= 0
    assert "cause" not in good
    assert (absent["status"], absent["cause"]) == (404, "not_found")
    assert (broken["status"], broken["cause"]) == (500, "internal")
    capfd.readouterr()


def test_what_is_no_request_is_passed_over() -> None:
    async def test(client: Client) -> None:
        async def unused(*_: object) -> Any:
            raise AssertionError

        await client.application({"type": "lifespan"}, unused, unused)

    ask(test)
