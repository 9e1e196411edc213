"""Slow, invalid and disconnected clients of one worker with short timeouts."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from uvicorn.server import ServerState

from cifarx_serve.server.http.connection import Connection, uvicorn_config
from cifarx_serve.server.settings import Limits, Settings
from tests.support.color_model import write_onnx
from tests.support.server_process import Client, ServerProcess, encode_request, run_worker, wait_until

HEADER_TIMEOUT_S, BODY_TIMEOUT_S, KEEP_ALIVE_S = 0.5, 1.0, 1.0
MAX_BODY_BYTES = 2**20
MAX_HEADER_BYTES = 64 * 1024

LIMITS = Limits(
    header_timeout_s=HEADER_TIMEOUT_S,
    body_timeout_s=BODY_TIMEOUT_S,
    keep_alive_s=KEEP_ALIVE_S,
    max_body_bytes=MAX_BODY_BYTES,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("connection")
    model = write_onnx(directory / "colors.onnx")
    with run_worker(directory / "worker", Settings(files={"colors": str(model)}, limits=LIMITS)) as worker:
        yield worker
        assert worker.stop() == 0
        assert worker.err == ""


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with server.connect() as connected:
        yield connected


def is_alive(server: ServerProcess) -> bool:
    return server.request("GET", "/healthz").status == 200


# Slow clients


def test_closes_a_connection_without_a_request(client: Client) -> None:
    assert client.is_closed()


def test_rejects_headers_that_do_not_end_with_408(client: Client) -> None:
    client.send(b"GET /healthz HTTP/1.1\r\nhost:")
    response = client.read_response()
    assert response.status == 408
    assert response.json["error"] == "the headers were not received within 0.5 s: send them faster"
    assert response.headers["connection"] == "close"
    assert client.is_closed()


def test_headers_sent_byte_by_byte_have_the_same_timeout(client: Client) -> None:
    """As in a Slowloris attack: every byte is in time, but the headers as a whole are not."""
    started = time.monotonic()
    client.send(b"GET /healthz HTTP/1.1\r\nx: ")
    client.socket.settimeout(HEADER_TIMEOUT_S / 5)
    while True:
        client.send(b"x")
        try:
            assert client.read_response().status == 408
            break
        except TimeoutError:
            assert time.monotonic() < started + 20


def test_incomplete_headers_of_a_second_request_return_408(client: Client) -> None:
    client.send(encode_request("GET", "/healthz") + b"GET /healthz HT")
    assert client.read_response().status == 200
    assert client.read_response().status == 408


def test_an_incomplete_body_returns_408(client: Client) -> None:
    client.send(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc")
    response = client.read_response()
    assert response.status == 408
    assert response.json["error"] == "the body was not received within 1 s: send it faster, or send less"
    assert client.is_closed()


def test_closes_an_idle_connection(client: Client) -> None:
    client.send(encode_request("GET", "/healthz"))
    assert client.read_response().status == 200
    assert client.is_closed()


def test_an_unread_body_does_not_keep_the_connection_open(client: Client) -> None:
    """The response does not wait for the body, and the connection does not wait for it without end."""
    client.send(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nabc")
    assert client.read_response().status == 404
    client.send(b"abc")
    assert client.is_closed()


def test_answers_the_request_after_an_unread_body(client: Client) -> None:
    client.send(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\nabc")
    assert client.read_response().status == 404
    client.send(bytes(199_997))
    client.send(encode_request("GET", "/healthz"))
    assert client.read_response().status == 200
    assert client.is_closed()


# Large requests


def test_rejects_headers_that_are_too_large(client: Client) -> None:
    client.send(encode_request("GET", "/healthz", x="x" * MAX_HEADER_BYTES))
    response = client.read_response()
    assert response.status == 431
    message = "the headers are over the limit of 65,536 bytes: send fewer or shorter headers"
    assert response.json["error"] == message
    assert client.is_closed()


def test_rejects_endless_headers(server: ServerProcess, client: Client) -> None:
    client.send(b"GET /healthz HTTP/1.1\r\n")
    for _ in range(500):
        client.send(b"x: " + b"x" * 65_000 + b"\r\n")
    assert client.read_response().status == 431
    assert client.is_closed()
    assert is_alive(server)


def test_accepts_headers_just_below_the_limit(client: Client) -> None:
    client.send(encode_request("GET", "/healthz", x="x" * (MAX_HEADER_BYTES - 200)))
    assert client.read_response().status == 200


def test_rejects_endless_trailers(server: ServerProcess, client: Client) -> None:
    """Trailers are headers after the last chunk of a body."""
    client.send(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
    for _ in range(500):
        client.send(b"x: " + b"x" * 65_000 + b"\r\n")
    assert client.read_response().status == 431
    assert client.is_closed()
    assert is_alive(server)


def test_a_client_that_sends_a_body_that_is_too_large_gets_the_error(client: Client) -> None:
    """The client, which reads only after it has sent everything, gets the response and not a reset."""
    client.send(encode_request("POST", "/v1/predict", bytes(40 * MAX_BODY_BYTES), content_type="image/png"))
    response = client.read_response()
    assert response.status == 413
    assert "over the limit of 1,048,576 bytes" in response.json["error"]
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_early_response_reaches_a_client_that_is_still_sending(client: Client, version: str) -> None:
    body = bytes(20 * MAX_BODY_BYTES)
    head = f"POST /nowhere HTTP/{version}\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    client.send(head.encode() + body)
    assert client.read_response().status == 404
    assert client.is_closed()


def test_rejects_a_chunked_body_that_is_too_large(client: Client) -> None:
    client.send(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(40):
        client.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")
    assert client.read_response().status == 413


# Invalid requests


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS to a port without TLS
        b"GET /healthz HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nbad header\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnothing\r\n",
        b"GET /caf\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n",
        bytes(100_000),
    ],
    ids=["text", "tls", "version", "header", "negative", "twice", "chunk", "path", "zeros"],
)
def test_rejects_what_is_not_http_with_400(server: ServerProcess, client: Client, data: bytes) -> None:
    client.send(data)
    response = client.read_response()
    assert response.status == 400
    assert response.headers["content-type"] == "application/json"
    assert response.json["error"] == "invalid http request received: send HTTP/1.1"
    assert client.is_closed()
    assert is_alive(server)


def test_survives_clients_that_disconnect_at_any_point(server: ServerProcess) -> None:
    whole = encode_request("POST", "/v1/predict", bytes(1000), content_type="image/png")
    for end in (0, 1, 30, len(whole) - 1, len(whole)):
        with server.connect() as client:
            client.send(whole[:end])
    for _ in range(20):  # reset the connection while responses are being sent
        with server.connect() as client:
            client.send(encode_request("GET", "/docs") * 20)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert is_alive(server)


def test_survives_a_client_that_closes_its_side_within_the_headers(server: ServerProcess, client: Client) -> None:
    client.send(encode_request("GET", "/healthz")[:-2])
    client.socket.shutdown(socket.SHUT_WR)
    assert client.is_closed()
    assert is_alive(server)


# Valid requests


def test_answers_pipelined_requests_in_order(client: Client) -> None:
    ids = [f"request-{number}" for number in range(50)]
    paths = ["/healthz", "/v1/models", "/nowhere", "/openapi.json"]
    client.send(b"".join(encode_request("GET", paths[n % 4], x_request_id=id_) for n, id_ in enumerate(ids)))
    responses = [client.read_response() for _ in ids]
    assert [response.headers["x-request-id"] for response in responses] == ids
    assert [response.status for response in responses[:4]] == [200, 200, 404, 200]


def test_rejects_too_many_pipelined_requests_with_429(server: ServerProcess, client: Client) -> None:
    client.send(encode_request("GET", "/healthz") * 5000)
    assert client.read_response().status == 429
    assert is_alive(server)


def test_gives_up_a_response_that_the_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarx_serve.server.http.connection._WRITE_TIMEOUT_S", 0.2)
    length = 1 << 22

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(length).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(length)})

    async def read_late(client: socket.socket, server: socket.socket) -> bytes:
        config, state = uvicorn_config(app, KEEP_ALIVE_S), ServerState()
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: Connection(config, state, HEADER_TIMEOUT_S), server)
        client.sendall(encode_request("GET", "/", connection="close"))
        while not state.connections:
            await asyncio.sleep(0.01)
        while state.connections or state.tasks:
            await asyncio.sleep(0.01)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))

    client, server = socket.socketpair()
    with client, server:
        received = asyncio.run(read_late(client, server))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert len(received) < length


def test_answers_a_request_sent_byte_by_byte(client: Client) -> None:
    for byte in encode_request("GET", "/healthz"):
        client.send(bytes([byte]))
    assert client.read_response().json == {"status": "alive"}


def test_answers_http_1_0_and_closes_the_connection(client: Client) -> None:
    client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
    response = client.read_response()
    assert response.json == {"status": "alive"}
    assert response.headers["connection"] == "close"
    assert client.is_closed()


def test_the_response_to_head_has_no_body(client: Client) -> None:
    client.send(encode_request("HEAD", "/healthz") + encode_request("GET", "/healthz"))
    assert client.read_response(has_body=False).headers["content-length"] == "18"
    assert client.read_response().json == {"status": "alive"}


def test_sends_100_continue(client: Client) -> None:
    body = b"no image"
    headers, _, _ = encode_request("POST", "/v1/predict", body, expect="100-continue").partition(body)
    client.send(headers)
    assert client.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(body)
    assert client.read_response().status == 400


def test_answers_a_request_for_an_upgrade_without_it(client: Client) -> None:
    client.send(encode_request("GET", "/healthz", connection="Upgrade", upgrade="websocket"))
    assert client.read_response().json == {"status": "alive"}


@pytest.mark.parametrize("length", [10, 300_000])
def test_answers_a_request_for_an_upgrade_with_a_body(client: Client, length: int) -> None:
    """Java's HTTP client sends its first request with an upgrade to HTTP/2."""
    data = encode_request("POST", "/v1/predict", bytes(length), connection="Upgrade, HTTP2-Settings", upgrade="h2c")
    client.send(data[:50])
    client.send(data[50:])
    assert "not an image" in client.read_response().json["error"]


@pytest.mark.parametrize("upgrades", ["10", "01", "101", "0110"])
def test_answers_all_pipelined_requests_if_some_ask_for_an_upgrade(client: Client, upgrades: str) -> None:
    usual = encode_request("GET", "/healthz")
    with_upgrade = encode_request("GET", "/healthz", connection="Upgrade, HTTP2-Settings", upgrade="h2c")
    client.send(b"".join(with_upgrade if upgrade == "1" else usual for upgrade in upgrades))
    assert [client.read_response().json for _ in upgrades] == [{"status": "alive"}] * len(upgrades)


def test_a_request_for_an_upgrade_can_close_the_connection(client: Client) -> None:
    client.send(encode_request("GET", "/healthz", connection="close, Upgrade", upgrade="h2c"))
    assert client.read_response().status == 200
    assert client.is_closed()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_a_request_has_one_host(client: Client, head: bytes, status: int) -> None:
    client.send(head)
    response = client.read_response()
    assert response.status == status
    if status == 400:
        assert re.fullmatch("the request has (no|2) Host headers: send one", response.json["error"])
        assert client.is_closed()


def test_logs_a_request(server: ServerProcess) -> None:
    server.request("GET", "/healthz", x_request_id="in-the-log")
    wait_until(lambda: "in-the-log" in server.out)
    lines = [json.loads(line) for line in server.out.splitlines()]
    record = next(line for line in lines if line["id"] == "in-the-log")
    assert record["method"] == "GET"
    assert record["path"] == "/healthz"
    assert record["status"] == 200
