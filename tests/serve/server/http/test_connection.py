"""A worker alone, with short timeouts, against clients that are slow, wrong, or gone."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from uvicorn.server import ServerState

from cifarx_serve.server.http.connection import Connection, uvicorn_config
from cifarx_serve.server.settings import Limits, Settings
from tests.support.color_model import write_onnx
from tests.support.running_server import Client, Running, request, wait_until, worker

HEAD_S, BODY_S, KEEP_S = 0.5, 1.0, 1.0
MAX_BODY = 2**20
MAX_HEAD = 64 * 1024

LIMITS = Limits(header_timeout_s=HEAD_S, body_timeout_s=BODY_S, keep_alive_s=KEEP_S, max_body_bytes=MAX_BODY)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("connection")
    model = write_onnx(folder / "colours.onnx")
    with worker(folder / "worker", Settings(files={"colours": str(model)}, limits=LIMITS)) as running:
        yield running
        assert running.end() == 0
        assert running.err == ""


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with server.connect() as connected:
        yield connected


def alive(server: Running) -> bool:
    return server.ask("GET", "/healthz").status == 200


# Slow clients


def test_a_connection_that_asks_nothing_is_closed(client: Client) -> None:
    assert client.is_closed()


def test_a_head_that_does_not_end_is_answered_with_408(client: Client) -> None:
    client.send(b"GET /healthz HTTP/1.1\r\nhost:")
    answer = client.answer()
    assert answer.status == 408
    assert "did not come within 0.5 s" in answer.json["error"]
    assert answer.headers["connection"] == "close"
    assert client.is_closed()


def test_a_head_that_comes_byte_by_byte_has_no_more_time(client: Client) -> None:
    """Slowloris: every byte is in time, the head is not."""
    started = time.monotonic()
    client.send(b"GET /healthz HTTP/1.1\r\nx: ")
    client.socket.settimeout(HEAD_S / 5)
    while True:
        client.send(b"x")
        try:
            assert client.answer().status == 408
            break
        except TimeoutError:
            assert time.monotonic() < started + 20


def test_a_second_head_that_does_not_end_is_answered_with_408(client: Client) -> None:
    client.send(request("GET", "/healthz") + b"GET /healthz HT")
    assert client.answer().status == 200
    assert client.answer().status == 408


def test_a_body_that_does_not_end_is_answered_with_408(client: Client) -> None:
    client.send(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc")
    answer = client.answer()
    assert answer.status == 408
    assert "the body did not come within 1 s" in answer.json["error"]
    assert client.is_closed()


def test_a_quiet_connection_is_closed(client: Client) -> None:
    client.send(request("GET", "/healthz"))
    assert client.answer().status == 200
    assert client.is_closed()


def test_a_body_that_nobody_reads_holds_no_connection(client: Client) -> None:
    """The answer does not wait for it; neither does the connection, for ever."""
    client.send(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nabc")
    assert client.answer().status == 404
    client.send(b"abc")
    assert client.is_closed()


def test_a_body_that_nobody_reads_may_be_followed_by_a_request(client: Client) -> None:
    client.send(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\nabc")
    assert client.answer().status == 404
    client.send(bytes(199_997))
    client.send(request("GET", "/healthz"))
    assert client.answer().status == 200
    assert client.is_closed()


# Large ones


def test_a_head_that_is_too_large(client: Client) -> None:
    client.send(request("GET", "/healthz", x="x" * MAX_HEAD))
    answer = client.answer()
    assert answer.status == 431
    assert "65,536 bytes" in answer.json["error"]
    assert client.is_closed()


def test_a_head_that_never_ends(server: Running, client: Client) -> None:
    client.send(b"GET /healthz HTTP/1.1\r\n")
    for _ in range(500):
        client.send(b"x: " + b"x" * 65_000 + b"\r\n")
    assert client.answer().status == 431
    assert client.is_closed()
    assert alive(server)


def test_a_head_of_nearly_the_limit(client: Client) -> None:
    client.send(request("GET", "/healthz", x="x" * (MAX_HEAD - 200)))
    assert client.answer().status == 200


def test_trailers_that_never_end(server: Running, client: Client) -> None:
    """After the last chunk of a body come headers once more."""
    client.send(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
    for _ in range(500):
        client.send(b"x: " + b"x" * 65_000 + b"\r\n")
    assert client.answer().status == 431
    assert client.is_closed()
    assert alive(server)


def test_a_body_that_is_too_large_is_refused_while_it_is_sent(client: Client) -> None:
    """The client, which reads once it has sent all, has the answer, not a reset."""
    client.send(request("POST", "/v1/predict", bytes(40 * MAX_BODY), content_type="image/png"))
    answer = client.answer()
    assert answer.status == 413
    assert "1,048,576" in answer.json["error"]
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_early_answer_reaches_a_client_that_still_sends(client: Client, version: str) -> None:
    body = bytes(20 * MAX_BODY)
    head = f"POST /nowhere HTTP/{version}\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    client.send(head.encode() + body)
    assert client.answer().status == 404
    assert client.is_closed()


def test_a_body_in_chunks_that_is_too_large(client: Client) -> None:
    client.send(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(40):
        client.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")
    assert client.answer().status == 413


# Wrong ones


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS, to a port without
        b"GET /healthz HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nbad header\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnothing\r\n",
        b"GET /caf\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n",
        bytes(100_000),
    ],
    ids=["words", "tls", "version", "header", "negative", "twice", "chunk", "path", "zeros"],
)
def test_what_is_no_http_is_answered_with_400(server: Running, client: Client, data: bytes) -> None:
    client.send(data)
    answer = client.answer()
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    assert "send HTTP/1.1" in answer.json["error"]
    assert client.is_closed()
    assert alive(server)


def test_clients_that_leave_in_the_middle(server: Running) -> None:
    whole = request("POST", "/v1/predict", bytes(1000), content_type="image/png")
    for end in (0, 1, 30, len(whole) - 1, len(whole)):
        with server.connect() as client:
            client.send(whole[:end])
    for _ in range(20):  # and one that leaves by a reset, with answers on their way
        with server.connect() as client:
            client.send(request("GET", "/docs") * 20)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert alive(server)


def test_a_client_that_closes_its_side_has_no_answer_but_harms_nobody(server: Running, client: Client) -> None:
    client.send(request("GET", "/healthz")[:-2])
    client.socket.shutdown(socket.SHUT_WR)
    assert client.is_closed()
    assert alive(server)


# Right ones


def test_pipelined_requests_are_answered_in_order(client: Client) -> None:
    ids = [f"number-{position}" for position in range(50)]
    paths = ["/healthz", "/v1/models", "/nowhere", "/openapi.json"]
    client.send(b"".join(request("GET", paths[n % 4], x_request_id=name) for n, name in enumerate(ids)))
    answers = [client.answer() for _ in ids]
    assert [answer.headers["x-request-id"] for answer in answers] == ids
    assert [answer.status for answer in answers[:4]] == [200, 200, 404, 200]


def test_more_pipelined_requests_than_are_taken(server: Running, client: Client) -> None:
    client.send(request("GET", "/healthz") * 5000)
    assert client.answer().status == 429
    assert alive(server)


def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarx_serve.server.http.connection._UNREAD_S", 0.2)
    length = 1 << 22

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(length).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(length)})

    async def read_late(reader: socket.socket, ours: socket.socket) -> bytes:
        config, state = uvicorn_config(application, KEEP_S), ServerState()
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: Connection(config, state, HEAD_S), ours)
        reader.sendall(request("GET", "/", connection="close"))
        while not state.connections:
            await asyncio.sleep(0.01)
        while state.connections or state.tasks:
            await asyncio.sleep(0.01)
        return b"".join(iter(lambda: reader.recv(1 << 16), b""))

    reader, ours = socket.socketpair()
    with reader, ours:
        read = asyncio.run(read_late(reader, ours))
    assert read.startswith(b"HTTP/1.1 200 ")
    assert len(read) < length


def test_a_request_in_single_bytes(client: Client) -> None:
    for byte in request("GET", "/healthz"):
        client.send(bytes([byte]))
    assert client.answer().json == {"status": "alive"}


def test_http_1_0_is_answered_and_closed(client: Client) -> None:
    client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
    answer = client.answer()
    assert answer.json == {"status": "alive"}
    assert answer.headers["connection"] == "close"
    assert client.is_closed()


def test_a_head_alone_has_no_body(client: Client) -> None:
    client.send(request("HEAD", "/healthz") + request("GET", "/healthz"))
    assert client.answer(has_body=False).headers["content-length"] == "18"
    assert client.answer().json == {"status": "alive"}


def test_a_client_that_waits_for_100_continue(client: Client) -> None:
    body = b"no image"
    head, _, _ = request("POST", "/v1/predict", body, expect="100-continue").partition(body)
    client.send(head)
    first = client.socket.recv(100)
    assert first == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(body)
    assert client.answer().status == 400


def test_an_upgrade_that_is_not_had(client: Client) -> None:
    """The request is answered as it stands."""
    client.send(request("GET", "/healthz", connection="Upgrade", upgrade="websocket"))
    assert client.answer().json == {"status": "alive"}


@pytest.mark.parametrize("length", [10, 300_000])
def test_an_upgrade_with_a_body(client: Client, length: int) -> None:
    """As Java's client asks for HTTP/2 first."""
    asked = request("POST", "/v1/predict", bytes(length), connection="Upgrade, HTTP2-Settings", upgrade="h2c")
    client.send(asked[:50])
    client.send(asked[50:])
    assert "not an image" in client.answer().json["error"]


def test_the_log_has_a_line_for_each(server: Running) -> None:
    server.ask("GET", "/healthz", x_request_id="in-the-log")
    wait_until(lambda: "in-the-log" in server.out)
    lines = [json.loads(line) for line in server.out.splitlines()]
    found = next(line for line in lines if line["id"] == "in-the-log")
    assert found["method"] == "GET"
    assert found["path"] == "/healthz"
    assert found["status"] == 200
