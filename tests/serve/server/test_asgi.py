"""What all requests have in common, tested with routes of these tests."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cifarx_serve.errors import UsageError
from cifarx_serve.server.asgi import Route
from cifarx_serve.server.errors import CAUSES, ClientDisconnect, RequestError
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.http.response import Response
from tests.support.asgi_client import AsgiClient, open_client


async def echo(request: Request) -> Response:
    return Response(json.dumps([request.path, request.path_params]).encode(), headers=((b"x-own", b"1"),))


async def fail(request: Request) -> Response:
    raise RequestError(HTTPStatus(int(request.path_params["status"])), "what is wrong", "how to fix it")


async def crash(_: Request) -> Response:
    raise ZeroDivisionError("secret of the server")


async def disconnect(_: Request) -> Response:
    raise ClientDisconnect


ROUTES = [
    Route("GET", "/thing", echo, None),
    Route("POST", "/thing", echo, None),
    Route("POST", "/only/{name}", echo, None),
    Route("GET", "/things/{name}", echo, None),
    Route("GET", "/things/{name}/parts/{part}", echo, None),
    Route("GET", "/public", echo, None, public=True),
    Route("GET", "/fail/{status}", fail, None, public=True),
    Route("GET", "/crash", crash, None, public=True),
    Route("GET", "/disconnect", disconnect, None, public=True),
]


def run(test: Callable[[AsgiClient], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with open_client({}, routes=ROUTES, **options) as client:
            await test(client)

    asyncio.run(main())


def counters(client: AsgiClient) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(client.metrics.render().decode())
        for sample in family.samples
        if sample.name.endswith("_total")
    }


@pytest.mark.parametrize(
    ("path", "path_params"),
    [
        ("/thing", {}),
        ("/things/a", {"name": "a"}),
        ("/things/a b.é%", {"name": "a b.é%"}),
        ("/things/a/parts/1", {"name": "a", "part": "1"}),
    ],
)
def test_calls_the_handler_of_the_route(path: str, path_params: dict[str, str]) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get(path)
        assert (response.status, response.json) == (200, [path, path_params])
        assert response.headers["x-own"] == "1"

    run(test)


@pytest.mark.parametrize(
    "path", ["/", "", "/Thing", "/thing/", "/things", "/things/", "/things/a/b", "//thing", "*", "/things/a/parts/"]
)
def test_rejects_a_path_without_a_route(path: str) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get(path)
        assert response.status == 404
        assert response.error == f"no route matches the path {path!r}: see /docs for the routes"

    run(test)


def test_an_error_shortens_a_long_path() -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get("/" + "x" * 10_000 + "<script>")
        assert len(response.body) < 200
        assert response.headers["content-type"] == "application/json"

    run(test)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/thing", "GET, HEAD, POST"),
        ("GET", "/only/a", "POST"),
        ("HEAD", "/only/a", "POST"),
        ("POST", "/public", "GET, HEAD"),
        ("OPTIONS", "/public", "GET, HEAD"),
    ],
)
def test_rejects_a_method_and_names_the_allowed_ones(method: str, path: str, allow: str) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.request(method, path)
        assert (response.status, response.headers["allow"]) == (405, allow)
        assert response.error == f"method {method} is not allowed here: use {allow}"

    run(test)


def test_answers_head_like_get() -> None:
    """The ASGI server omits the body."""

    async def test(client: AsgiClient) -> None:
        get, head = await client.get("/thing"), await client.request("HEAD", "/thing")
        assert (head.status, head.headers["content-length"]) == (200, get.headers["content-length"])

    run(test)


@pytest.mark.parametrize("path", ["/thing", "/missing", "/crash", "/fail/503", "/fail/413"])
def test_every_response_has_a_request_id_and_security_headers(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get(path)
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-store"
        assert len(response.headers["x-request-id"]) == 32
        assert not [name for name in response.headers if name.startswith("access-control")]
        valid = await client.get(path, x_request_id="my-own/42")
        assert valid.headers["x-request-id"] == "my-own/42"
        invalid = await client.get(path, x_request_id="not\r\nvalid")
        assert len(invalid.headers["x-request-id"]) == 32

    run(test)
    capfd.readouterr()


@pytest.mark.parametrize("status", sorted(CAUSES))
def test_a_request_error_is_json_with_its_status(status: HTTPStatus) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get(f"/fail/{status:d}")
        assert response.status == status
        assert response.error == "what is wrong: how to fix it"
        assert response.headers.get("retry-after") == ("1" if status == 503 else None)
        assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
        assert response.headers.get("connection") == ("close" if status in (408, 413) else None)
        assert counters(client)["cifarx_errors_total", CAUSES[status]] == 1

    run(test)


def test_an_unexpected_exception_is_logged_and_not_sent(capfd: pytest.CaptureFixture[str]) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get("/crash")
        assert response.status == 500
        assert response.error == "internal server error: see the log of the server"
        assert counters(client)["cifarx_requests_total", "/crash", "500"] == 1
        assert (await client.get("/thing")).status == 200

    run(test)
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: secret of the server" in err
    assert "in crash" in err


def test_sends_nothing_to_a_disconnected_client() -> None:
    file = io.BytesIO()

    async def test(client: AsgiClient) -> None:
        client.disconnected.set()
        with pytest.raises(ValueError, match="unpack"):
            await client.get("/disconnect")
        assert client.sent == []
        assert counters(client)["cifarx_errors_total", "client_left"] == 1

    async def main() -> None:
        access_log = AccessLog(file)
        async with open_client({}, routes=ROUTES, access_log=access_log) as client:
            await test(client)
        access_log.flush()

    asyncio.run(main())
    assert json.loads(file.getvalue())["status"] == 499


@pytest.fixture
def api_key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("secret\n")
    return path


def test_a_route_that_is_not_public_requires_an_api_key(api_key_file: Path) -> None:
    async def test(client: AsgiClient) -> None:
        rejected = await client.get("/thing")
        assert rejected.status == 401
        assert rejected.error == "missing or invalid API key: send Authorization: Bearer KEY"
        assert rejected.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/things/a", x_api_key="wrong")).status == 401
        assert (await client.request("HEAD", "/thing")).status == 401
        assert (await client.get("/public")).status == 200
        assert (await client.get("/thing", x_api_key="secret")).status == 200
        assert (await client.get("/things/a", authorization="Bearer secret")).status == 200
        assert (await client.get("/missing")).status == 404

    run(test, api_key_file=api_key_file)


def test_allows_requests_from_the_cors_origin(api_key_file: Path) -> None:
    async def test(client: AsgiClient) -> None:
        headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
        preflight = await client.request("OPTIONS", "/thing", headers=headers)
        assert (preflight.status, preflight.body) == (204, b"")
        assert preflight.headers["access-control-allow-origin"] == "https://example.org"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        for name in ("authorization", "content-type", "x-api-key"):
            assert name in preflight.headers["access-control-allow-headers"]
        for response in (
            await client.get("/thing", x_api_key="secret"),
            await client.get("/thing"),
            await client.get("/x"),
        ):
            assert response.headers["access-control-allow-origin"] == "https://example.org"
            assert response.headers["vary"] == "origin"
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert (await client.request("OPTIONS", "/missing", headers=headers)).status == 404

    run(test, api_key_file=api_key_file, cors_origin="https://example.org")


def test_closes_connections_while_draining() -> None:
    async def test(client: AsgiClient) -> None:
        assert "connection" not in (await client.get("/thing")).headers
        client.repository.draining = True
        assert (await client.get("/thing")).headers["connection"] == "close"

    run(test)


def test_logs_and_counts_every_request(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()

    async def main() -> None:
        access_log = AccessLog(file)
        async with open_client({}, routes=ROUTES, access_log=access_log) as client:
            await client.get("/things/a?secret=1", x_request_id="mine")
            await client.request("POST", "/missing")
            await client.get("/crash")
            await client.request("DELETE", "/thing")
            counted = counters(client)
        access_log.flush()
        assert counted["cifarx_requests_total", "/things/{name}", "200"] == 1
        assert counted["cifarx_requests_total", "unknown", "404"] == 1
        assert counted["cifarx_requests_total", "/thing", "405"] == 1
        assert counted["cifarx_errors_total", "internal"] == 1

    asyncio.run(main())
    good, missing, crashed, _ = map(json.loads, file.getvalue().splitlines())
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
    assert (missing["status"], missing["cause"]) == (404, "not_found")
    assert (crashed["status"], crashed["cause"]) == (500, "internal")
    capfd.readouterr()


def test_ignores_other_scopes_than_http() -> None:
    async def test(client: AsgiClient) -> None:
        async def unused(*_: object) -> Any:
            raise AssertionError

        await client.app({"type": "lifespan"}, unused, unused)

    run(test)


@pytest.mark.parametrize("path", ["/models/thing", "/thing"])
def test_the_root_path_may_be_part_of_the_path(path: str) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get(path)
        assert (response.status, response.json) == (200, ["/thing", {}])

    run(test, root_path="/models")


@pytest.mark.parametrize("path", ["/thing", "/models/thing", "/edge/models/thing"])
def test_the_prefix_of_a_proxy_may_be_longer_than_the_root_path(path: str) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get(path, x_forwarded_prefix="/edge/models")
        assert (response.status, response.json) == (200, ["/thing", {}])

    run(test, root_path="/models", trusted_proxies=("127.0.0.1",))


def test_the_root_path_itself_redirects_to_the_first_page() -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get("/models")
        assert (response.status, response.headers["location"]) == (307, "/models/")
        assert (await client.get("/modelsandmore")).status == 404

    run(test, root_path="/models")


@pytest.mark.parametrize("root_path", ["/thing", "/things/a"])
def test_a_root_path_that_starts_like_a_route_is_refused(root_path: str) -> None:
    async def test(_: AsgiClient) -> None:
        pytest.fail("it is accepted")

    with pytest.raises(UsageError, match="starts like a route of the server: choose another prefix"):
        run(test, root_path=root_path)


def test_an_invalid_prefix_from_a_proxy_is_a_bad_request() -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get("/thing", x_forwarded_prefix="thing")
        assert response.status == 400
        assert response.error.startswith("X-Forwarded-Prefix is 'thing'")

    run(test, trusted_proxies=("127.0.0.1",))


def test_the_access_log_has_the_client_of_a_trusted_proxy() -> None:
    file = io.BytesIO()
    log = AccessLog(file)

    async def test(client: AsgiClient) -> None:
        await client.get("/models/thing", x_forwarded_for="9.9.9.9, 192.0.2.7")
        log.flush()
        record = json.loads(file.getvalue())
        assert (record["client"], record["path"]) == ("192.0.2.7", "/thing")

    run(test, access_log=log, trusted_proxies=("127.0.0.1",), root_path="/models")
