"""Unix sockets of servers: their files, and `cifarx serve --uds`."""

import json
import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from cifarx_serve.errors import UsageError
from cifarx_serve.server.processes.unix_socket import UnixSocket
from tests.support.color_model import write_onnx
from tests.support.server_process import Client, predict_request, run_server, start_server, wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cifarx.sock"


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    return client


def test_any_user_who_can_enter_the_directory_can_connect(path: Path) -> None:
    previous = os.umask(0o077)
    try:
        unix_socket = UnixSocket(path, 8)
    finally:
        os.umask(previous)
    with unix_socket.listener, connect(path) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        accepted, _ = unix_socket.listener.accept()
        with accepted:
            client.sendall(b"a")
            assert accepted.recv(1) == b"a"


def test_the_socket_of_a_server_that_was_killed_is_replaced(path: Path) -> None:
    UnixSocket(path, 8).listener.close()
    assert path.exists()
    second = UnixSocket(path, 8)
    with second.listener, connect(path):
        second.remove()
    assert not path.exists()


def test_the_socket_of_a_running_server_is_kept(path: Path) -> None:
    first = UnixSocket(path, 8)
    with first.listener:
        with pytest.raises(UsageError, match=r"another server listens on .*cifarx\.sock: stop it, or choose"):
            UnixSocket(path, 8)
        connect(path).close()


def test_a_server_with_a_full_backlog_is_running(path: Path) -> None:
    with UnixSocket(path, 0).listener, connect(path), pytest.raises(UsageError, match="another server listens on"):
        UnixSocket(path, 0)


@pytest.mark.parametrize("kind", ["file", "directory", "pipe", "link"])
def test_what_is_not_a_socket_is_never_removed(path: Path, tmp_path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        UnixSocket(tmp_path / "other.sock", 8).listener.close()
        path.symlink_to("other.sock")
    before = path.lstat()
    with pytest.raises(UsageError, match=r"exists and is not a socket: remove it, or choose another --uds"):
        UnixSocket(path, 8)
    assert os.path.samestat(before, path.lstat())


@pytest.mark.parametrize("name", ["absent/cifarx.sock", "a" * 200])
def test_a_path_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on the socket .*: choose another --uds"):
        UnixSocket(tmp_path / name, 8)


def test_the_file_of_another_server_is_not_removed(path: Path) -> None:
    first = UnixSocket(path, 8)
    with first.listener:
        path.unlink()
        second = UnixSocket(path, 8)
        with second.listener:
            first.remove()
            connect(path).close()
    second.remove()  # it is closed, so the file could be another server's
    assert path.exists()


def test_of_servers_that_start_at_once_one_listens(path: Path) -> None:
    UnixSocket(path, 8).listener.close()
    started: list[UnixSocket] = []
    errors: list[UsageError] = []

    def start() -> None:
        try:
            started.append(UnixSocket(path, 8))
        except UsageError as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(started), len(errors)) == (1, 7)
    started[0].listener.settimeout(5)
    with started[0].listener, connect(path):
        for _ in range(8):  # the tests of the others come first
            started[0].listener.accept()[0].close()


@pytest.mark.slow
def test_a_server_listens_on_a_socket_and_restarts_its_workers(tmp_path: Path, path: Path) -> None:
    model = write_onnx(tmp_path / "colors.onnx")
    with run_server(tmp_path / "server", model, "--workers", 2, "--uds", path) as server:
        assert server.uds == path
        assert server.predict().json["predictions"][0]["label"] == "red"
        wait_until(lambda: server.out)  # the access log is buffered
        server.workers()[0].kill()
        server.wait_for("is ready again")
        assert server.predict().status == 200
        assert server.stop() == 0
        assert not path.exists()
        records = [json.loads(line) for line in server.out.splitlines()]
        assert [(record["client"], record["path"]) for record in records] == [("", "/v1/predict")] * 2


@pytest.mark.slow
def test_a_server_that_drains_answers_all_its_connections_and_leaves_the_path_to_the_next(
    tmp_path: Path, path: Path
) -> None:
    model = write_onnx(tmp_path / "colors.onnx")
    with run_server(tmp_path / "server", model, "--workers", 2, "--uds", path) as server:
        clients: list[Client] = []
        stopping = threading.Timer(0.1, server.signal, [signal.SIGTERM])
        stopping.start()
        while True:
            try:
                clients.append(Client(path))
            except FileNotFoundError:
                break
            clients[-1].send(predict_request())
            time.sleep(0.002)
        with run_server(tmp_path / "next", model, "--workers", 1, "--uds", path) as following:
            for client in clients:
                with client:
                    assert client.read_response().status == 200
            assert server.wait() == 0
            assert following.predict().status == 200


@pytest.mark.slow
def test_a_killed_server_leaves_a_socket_that_the_next_one_replaces(tmp_path: Path, path: Path) -> None:
    model = write_onnx(tmp_path / "colors.onnx")
    with run_server(tmp_path / "server", model, "--workers", 1, "--uds", path) as server:
        with start_server(tmp_path / "second", model, "--workers", 1, "--uds", path) as second:
            assert second.wait() == 2
            assert "another server listens on" in second.err
        assert server.predict().status == 200
        server.signal(signal.SIGKILL)
        server.wait()
        assert server.leftovers() == []
    assert path.exists()
    with run_server(tmp_path / "third", model, "--workers", 1, "--uds", path) as third:
        assert third.predict().status == 200


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--uds", "a.sock", "--port", "1"), "--uds a.sock with --host or --port"),
        (("--uds", "a.sock", "--host", "127.0.0.1"), "--uds a.sock with --host or --port"),
        (("--trusted-proxy", "unix"), "--trusted-proxy unix without --uds trusts no client"),
        (("--uds", "a.sock", "--trusted-proxy", "10.0.0.0/8"), "with --uds trusts no client: add --trusted-proxy unix"),
        (("--trusted-proxy", "proxy.local"), "--trusted-proxy 'proxy.local' is not a network"),
        (("--root-path", "models/"), "--root-path 'models/' is not the prefix of a path"),
        (("--root-path", "/v2"), "--root-path /v2 starts like a route of the server"),
    ],
)
@pytest.mark.slow
def test_options_that_contradict_each_other(tmp_path: Path, options: tuple[str, ...], problem: str) -> None:
    model = write_onnx(tmp_path / "colors.onnx")
    port = () if "--uds" in options else ("--port", "0")
    with start_server(tmp_path / "server", model, "--workers", "1", *port, *options) as server:
        assert server.wait() == 2
        [line] = server.err.splitlines()
        assert line.startswith("error: ")
        assert problem in line
