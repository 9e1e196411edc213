"""Accepting, evicting and draining the connections of one worker, and TLS."""

import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cifarx_serve.errors import UsageError
from cifarx_serve.server.http.listener import create_ssl_context
from cifarx_serve.server.settings import Limits, Settings
from tests.support.certificates import client_ssl_context, create_certificate
from tests.support.color_model import write_onnx
from tests.support.faulty_backend import write_faulty_model
from tests.support.server_process import FAULTY_BACKEND, Client, encode_request, predict_request, run_worker


def make_settings(directory: Path, **fields: Any) -> Settings:
    model = write_faulty_model(directory / "colors.faulty")
    return Settings(files={"colors": str(model)}, registered_backends=(FAULTY_BACKEND,), **fields)


def wait_until_draining(client: Client) -> None:
    """Send requests without a pause, so that the connection is never idle, until the server is draining."""
    while True:
        client.send(encode_request("GET", "/readyz"))
        response = client.read_response()
        if response.status == 503:
            assert response.json == {"status": "draining"}
            assert response.headers["connection"] == "close"
            assert client.is_closed()
            return
        assert "connection" not in response.headers


def gets_no_response(client: Client) -> bool:
    client.socket.settimeout(0.3)
    try:
        client.read_response()
    except TimeoutError:
        client.socket.settimeout(60)
        return True
    return False


# Draining


def test_answers_the_requests_in_progress(tmp_path: Path) -> None:
    """This includes requests on an open connection, and those of which a client has sent only a part."""
    slow = tmp_path / "colors.slow"
    with run_worker(tmp_path / "worker", make_settings(tmp_path)) as server, ExitStack() as stack:
        kept, waiting, sending, second = (stack.enter_context(server.connect()) for _ in range(4))
        slow.touch()
        waiting.send(predict_request())
        sending.send(predict_request()[:-10])
        second.send(encode_request("GET", "/healthz"))
        assert second.read_response().status == 200
        second.send(b"GET /hea")
        server.signal(signal.SIGTERM)
        wait_until_draining(kept)
        slow.unlink()
        sending.send(predict_request()[-10:])
        second.send(b"lthz HTTP/1.1\r\nhost: test\r\n\r\n")
        for client in (waiting, sending, second):
            response = client.read_response()
            assert response.status == 200
            assert response.headers["connection"] == "close"
            assert client.is_closed()
        assert server.wait() == 0
        assert server.err == ""
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_answers_connections_in_the_queue_of_the_socket(tmp_path: Path) -> None:
    with run_worker(tmp_path / "worker", make_settings(tmp_path)) as server, ExitStack() as stack:
        server.signal(signal.SIGSTOP)
        clients = [stack.enter_context(server.connect()) for _ in range(50)]
        for client in clients:
            client.send(predict_request())
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGCONT)
        assert [client.read_response().status for client in clients] == [200] * 50
        assert server.wait() == 0


def test_closes_idle_connections(tmp_path: Path) -> None:
    with (
        run_worker(tmp_path / "worker", make_settings(tmp_path)) as server,
        server.connect() as new,
        server.connect() as kept,
    ):
        kept.send(encode_request("GET", "/healthz"))
        assert kept.read_response().status == 200
        server.signal(signal.SIGTERM)
        assert new.is_closed()
        assert kept.is_closed()
        assert server.wait() == 0


def test_answers_pipelined_requests(tmp_path: Path) -> None:
    """The second request is in progress for longer than a connection may be idle."""
    slow = tmp_path / "colors.slow"
    with run_worker(tmp_path / "worker", make_settings(tmp_path)) as server:
        with server.connect() as client, server.connect() as kept:
            slow.touch()
            client.send(encode_request("GET", "/healthz") + predict_request())
            assert client.read_response().status == 200
            server.signal(signal.SIGTERM)
            wait_until_draining(kept)
            assert gets_no_response(client)
            assert gets_no_response(client)
            slow.unlink()
            assert client.read_response().status == 200
        assert server.wait() == 0


# The limit of connections


def test_connections_over_the_limit_wait(tmp_path: Path) -> None:
    with run_worker(tmp_path / "worker", make_settings(tmp_path, limits=Limits(max_connections=2))) as server:
        with ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(5)]
            for client in clients:
                client.send(encode_request("GET", "/healthz"))
            for client in clients[:2]:
                assert client.read_response().status == 200
                client.send(b"GET ")  # it is not idle, so it is not evicted
            assert gets_no_response(clients[2])
            for position in (2, 3, 4):
                clients[position - 2].socket.close()
                assert clients[position].read_response().status == 200
                clients[position].send(b"GET ")
        assert server.stop() == 0


def test_evicts_the_longest_idle_connection(tmp_path: Path) -> None:
    """A connection within a request is not evicted."""
    limits = Limits(max_connections=3)
    with run_worker(tmp_path / "worker", make_settings(tmp_path, limits=limits)) as server, ExitStack() as stack:
        busy, oldest, newer = (stack.enter_context(server.connect()) for _ in range(3))
        busy.send(encode_request("GET", "/healthz"))
        assert busy.read_response().status == 200
        busy.send(b"GET /healthz HTTP/1.1\r\n")
        time.sleep(0.2)
        newer.send(encode_request("GET", "/healthz"))
        assert newer.read_response().status == 200
        last = stack.enter_context(server.connect())
        last.send(encode_request("GET", "/healthz"))
        assert last.read_response().status == 200
        assert oldest.is_closed()
        busy.send(b"Host: a\r\n\r\n")
        newer.send(encode_request("GET", "/healthz"))
        assert [client.read_response().status for client in (busy, newer)] == [200, 200]
        assert server.stop() == 0


def test_evicts_a_tls_connection_that_does_not_confirm(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """The client never reads, so it does not answer the closure alert of TLS."""
    limits = Limits(max_connections=1)
    settings = make_settings(tmp_path, limits=limits, certfile=str(certificate[0]), keyfile=str(certificate[1]))
    with run_worker(tmp_path / "worker", settings) as server:
        server.ssl_context = client_ssl_context(certificate[0])
        with server.connect() as idle:
            idle.send(encode_request("GET", "/healthz"))
            assert idle.read_response().status == 200
            assert server.request("GET", "/healthz").status == 200
        assert server.stop() == 0


def test_draining_answers_connections_over_the_limit(tmp_path: Path) -> None:
    with run_worker(tmp_path / "worker", make_settings(tmp_path, limits=Limits(max_connections=1))) as server:
        with server.connect() as first, server.connect() as second:
            first.send(encode_request("GET", "/healthz"))
            assert first.read_response().status == 200
            second.send(encode_request("GET", "/healthz"))
            assert gets_no_response(second)
            server.signal(signal.SIGTERM)
            assert second.read_response().status == 200
        assert server.wait() == 0


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return create_certificate(tmp_path_factory.mktemp("tls"))


def test_serves_over_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    settings = make_settings(tmp_path, certfile=str(certificate[0]), keyfile=str(certificate[1]))
    with run_worker(tmp_path / "worker", settings) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            plain.sendall(encode_request("GET", "/healthz"))
            assert b"HTTP" not in plain.recv(1000)
        with socket.create_connection(("127.0.0.1", server.port)) as reset:
            reset.sendall(b"\x16\x03\x01")
        server.ssl_context = client_ssl_context(certificate[0])
        assert server.predict().json["predictions"][0]["label"] == "red"
        assert server.request("POST", "/nowhere", bytes(5_000_000), connection="close").status == 404
        with server.connect() as kept:
            kept.send(encode_request("GET", "/healthz") * 3)
            assert [kept.read_response().status for _ in range(3)] == [200] * 3
            server.signal(signal.SIGTERM)
            wait_until_draining(kept)
        assert server.wait() == 0
        assert server.err == ""


def test_closes_a_connection_without_tls_handshake(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    limits = Limits(header_timeout_s=0.5)
    settings = make_settings(tmp_path, certfile=str(certificate[0]), keyfile=str(certificate[1]), limits=limits)
    with run_worker(tmp_path / "worker", settings) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
            assert client.recv(1) == b""
        assert server.stop() == 0
        assert server.err == ""


def test_rejects_unusable_tls_files(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    certfile, keyfile = map(str, certificate)
    assert create_ssl_context(None, None) is None
    assert create_ssl_context(certfile, keyfile)
    (tmp_path / "locked").mkdir()
    _, locked = create_certificate(tmp_path / "locked", password="secret")
    other, _ = create_certificate(tmp_path)
    model = str(write_onnx(tmp_path / "colors.onnx"))
    problem = "TLS requires a certificate and its key: give both --certfile and --keyfile"
    for incomplete in ((certfile, None), (None, keyfile)):
        with pytest.raises(UsageError, match=problem):
            create_ssl_context(*incomplete)
    for files in ((certfile, str(locked)), (str(other), keyfile), (certfile, model), ("missing", keyfile)):
        with pytest.raises(UsageError, match=r"cannot use .*: give a PEM certificate and its key, without a password"):
            create_ssl_context(*files)
