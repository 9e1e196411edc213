"""A worker alone: who is let in, and how it ends."""

import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cifarx_serve.errors import UsageError
from cifarx_serve.server.http.listener import tls_context
from cifarx_serve.server.settings import Limits, Settings
from tests.support.color_model import write_onnx
from tests.support.planted_backend import write_planted
from tests.support.running_server import PLANTED, Client, picture, request, worker
from tests.support.self_signed import self_signed, trusting


def settings(folder: Path, **fields: object) -> Settings:
    model = write_planted(folder / "colours.planted")
    return Settings(files={"colours": str(model)}, registered=(PLANTED,), **fields)  # type: ignore[arg-type]


def until_draining(client: Client) -> None:
    """Ask on and on, so that the connection is never quiet, until the server says so."""
    while True:
        client.send(request("GET", "/readyz"))
        answer = client.answer()
        if answer.status == 503:
            assert answer.json == {"status": "draining"}
            assert answer.headers["connection"] == "close"
            assert client.is_closed()
            return
        assert "connection" not in answer.headers


def is_quiet(client: Client) -> bool:
    client.socket.settimeout(0.3)
    try:
        client.answer()
    except TimeoutError:
        client.socket.settimeout(60)
        return True
    return False


# The end


def test_what_is_under_way_is_answered(tmp_path: Path) -> None:
    """Also what comes on a connection that is open, and what two clients have sent but half."""
    slow = tmp_path / "colours.slow"
    with worker(tmp_path / "worker", settings(tmp_path)) as server, ExitStack() as stack:
        kept, asking, halfway, second = (stack.enter_context(server.connect()) for _ in range(4))
        slow.touch()
        asking.send(picture())
        halfway.send(picture()[:-10])
        second.send(request("GET", "/healthz"))
        assert second.answer().status == 200
        second.send(b"GET /hea")
        server.signal(signal.SIGTERM)
        until_draining(kept)
        slow.unlink()
        halfway.send(picture()[-10:])
        second.send(b"lthz HTTP/1.1\r\n\r\n")
        for client in (asking, halfway, second):
            answer = client.answer()
            assert answer.status == 200
            assert answer.headers["connection"] == "close"
            assert client.is_closed()
        assert server.wait() == 0
        assert server.err == ""
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_those_that_wait_to_be_let_in_are_answered(tmp_path: Path) -> None:
    with worker(tmp_path / "worker", settings(tmp_path)) as server, ExitStack() as stack:
        server.signal(signal.SIGSTOP)
        clients = [stack.enter_context(server.connect()) for _ in range(50)]
        for client in clients:
            client.send(picture())
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGCONT)
        assert [client.answer().status for client in clients] == [200] * 50
        assert server.wait() == 0


def test_a_quiet_connection_does_not_hold_the_end_up(tmp_path: Path) -> None:
    with worker(tmp_path / "worker", settings(tmp_path)) as server, server.connect() as new, server.connect() as kept:
        kept.send(request("GET", "/healthz"))
        assert kept.answer().status == 200
        server.signal(signal.SIGTERM)
        assert new.is_closed()
        assert kept.is_closed()
        assert server.wait() == 0


def test_pipelined_requests_hold_the_end_up(tmp_path: Path) -> None:
    """The first is answered before the end begins; the second is computed for longer than a connection may be quiet."""
    slow = tmp_path / "colours.slow"
    with worker(tmp_path / "worker", settings(tmp_path)) as server:
        with server.connect() as client, server.connect() as kept:
            slow.touch()
            client.send(request("GET", "/healthz") + picture())
            assert client.answer().status == 200
            server.signal(signal.SIGTERM)
            until_draining(kept)
            assert is_quiet(client)
            assert is_quiet(client)
            slow.unlink()
            assert client.answer().status == 200
        assert server.wait() == 0


# Who is let in


def test_more_than_may_be_open_wait(tmp_path: Path) -> None:
    with worker(tmp_path / "worker", settings(tmp_path, limits=Limits(max_connections=2))) as server:
        with ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(5)]
            for client in clients:
                client.send(request("GET", "/healthz"))
            for client in clients[:2]:
                assert client.answer().status == 200
                client.send(b"GET ")  # it is not quiet, and makes no room
            assert is_quiet(clients[2])
            for position in (2, 3, 4):
                clients[position - 2].socket.close()
                assert clients[position].answer().status == 200
                clients[position].send(b"GET ")
        assert server.end() == 0


def test_those_that_ask_nothing_make_room(tmp_path: Path) -> None:
    """The longest quiet; one that asks is left alone."""
    limits = Limits(max_connections=3)
    with worker(tmp_path / "worker", settings(tmp_path, limits=limits)) as server, ExitStack() as stack:
        asking, silent, younger = (stack.enter_context(server.connect()) for _ in range(3))
        asking.send(request("GET", "/healthz"))
        assert asking.answer().status == 200
        asking.send(b"GET /healthz HTTP/1.1\r\n")
        time.sleep(0.2)
        younger.send(request("GET", "/healthz"))
        assert younger.answer().status == 200
        last = stack.enter_context(server.connect())
        last.send(request("GET", "/healthz"))
        assert last.answer().status == 200
        assert silent.is_closed()
        asking.send(b"Host: a\r\n\r\n")
        younger.send(request("GET", "/healthz"))
        assert [client.answer().status for client in (asking, younger)] == [200, 200]
        assert server.end() == 0


def test_those_that_keep_silent_make_room_under_tls(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Though they never read, and so never say farewell."""
    limits = Limits(max_connections=1)
    told = settings(tmp_path, limits=limits, certificate=str(pair[0]), private_key=str(pair[1]))
    with worker(tmp_path / "worker", told) as server:
        server.tls = trusting(pair[0])
        with server.connect() as silent:
            silent.send(request("GET", "/healthz"))
            assert silent.answer().status == 200
            assert server.ask("GET", "/healthz").status == 200
        assert server.end() == 0


def test_more_than_may_be_open_are_answered_at_the_end(tmp_path: Path) -> None:
    with worker(tmp_path / "worker", settings(tmp_path, limits=Limits(max_connections=1))) as server:
        with server.connect() as first, server.connect() as second:
            first.send(request("GET", "/healthz"))
            assert first.answer().status == 200
            second.send(request("GET", "/healthz"))
            assert is_quiet(second)
            server.signal(signal.SIGTERM)
            assert second.answer().status == 200
        assert server.wait() == 0


# TLS


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return self_signed(tmp_path_factory.mktemp("tls"))


def test_tls(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    secured = settings(tmp_path, certificate=str(pair[0]), private_key=str(pair[1]))
    with worker(tmp_path / "worker", secured) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            plain.sendall(request("GET", "/healthz"))
            assert b"HTTP" not in plain.recv(1000)
        with socket.create_connection(("127.0.0.1", server.port)) as reset:
            reset.sendall(b"\x16\x03\x01")
        server.tls = trusting(pair[0])
        assert server.predict().json["predictions"][0]["label"] == "red"
        assert server.ask("POST", "/nowhere", bytes(5_000_000), connection="close").status == 404
        with server.connect() as kept:
            kept.send(request("GET", "/healthz") * 3)
            assert [kept.answer().status for _ in range(3)] == [200] * 3
            server.signal(signal.SIGTERM)
            until_draining(kept)
        assert server.wait() == 0
        assert server.err == ""


def test_tls_that_nobody_begins(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    fields = {"certificate": str(pair[0]), "private_key": str(pair[1]), "limits": Limits(header_timeout_s=0.5)}
    with worker(tmp_path / "worker", settings(tmp_path, **fields)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as silent:
            assert silent.recv(1) == b""
        assert server.end() == 0
        assert server.err == ""


def test_what_tls_takes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    certificate, key = map(str, pair)
    assert tls_context(None, None) is None
    assert tls_context(certificate, key)
    (tmp_path / "locked").mkdir()
    _, locked = self_signed(tmp_path / "locked", password="secret")
    other, _ = self_signed(tmp_path)
    model = str(write_onnx(tmp_path / "colours.onnx"))
    for given in ((certificate, None), (None, key)):
        with pytest.raises(UsageError, match="give both --certfile and --keyfile"):
            tls_context(*given)
    for given in ((certificate, str(locked)), (str(other), key), (certificate, model), ("absent", key)):
        with pytest.raises(UsageError, match=r"cannot use .* PEM certificate"):
            tls_context(*given)
