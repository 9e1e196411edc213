"""The processes of a server as a whole, by the real program."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import seal
from cifarx_serve.server.inference.model import file_version
from cifarx_serve.server.processes.supervisor import listen
from cifarx_serve.system.cpus import available_cpus
from tests.support.color_model import write_onnx
from tests.support.planted_backend import write_planted
from tests.support.running_server import (
    PROGRAM,
    Client,
    Running,
    picture,
    request,
    serving,
    starting,
    until_ready,
    wait_until,
)

# Servers of several processes, each a second to start.
pytestmark = pytest.mark.slow


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colours.onnx")


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """A path for Python, with the tests' backend as a package would offer it."""
    metadata = tmp_path / "plugin" / "planted-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[cifarx.backends]\nplanted = tests.support.planted_backend:PlantedBackend\n"
    )
    return os.pathsep.join((str(metadata.parent), str(Path(__file__).parents[4])))


@contextmanager
def two(tmp_path: Path, model: Path, *options: object, **environment: str) -> Iterator[Running]:
    with serving(tmp_path / "server", model, "--workers", 2, *options, **environment) as server:
        yield server


def ended_well(server: Running) -> bool:
    return server.wait() == 0 and not server.leftovers() and "Traceback" not in server.err


def answering(server: Running) -> set[int]:
    """The processes that answer: a connection may come to any."""
    found: set[int] = set()

    def look() -> bool:
        server.predict()
        wait_until(lambda: server.out.endswith("\n"))
        found.update(process.pid for process in server.workers() if f'"worker":{process.pid}' in server.out)
        return len(found) == 2

    wait_until(look)
    return found


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(tmp_path: Path, onnx: Path, number: int) -> None:
    """Nothing is left: no process, no file of its own."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with two(tmp_path, onnx, TMPDIR=str(temporary)) as server, server.connect() as kept:
        kept.send(request("GET", "/healthz"))
        assert kept.answer().status == 200
        assert list(temporary.glob("cifarx-serve-*/*.db"))
        server.signal(number)
        assert ended_well(server)
        assert kept.is_closed()
        assert not list(temporary.glob("cifarx*"))
        assert server.err.count("\n") == 1


def test_ctrl_c_ends_it_in_order(tmp_path: Path, onnx: Path) -> None:
    """It reaches every process of the terminal."""
    with two(tmp_path, onnx) as server:
        os.killpg(server.process.pid, signal.SIGINT)
        assert ended_well(server)


def test_is_ready_once_every_model_has_answered(tmp_path: Path, plugin: str) -> None:
    """It says where it serves then, and not before; a signal before then ends it too, whatever the model does."""
    model, slow = write_planted(tmp_path / "colours.planted"), tmp_path / "colours.slow"
    slow.touch()
    with starting(tmp_path / "server", model, "--workers", 2, PYTHONPATH=plugin) as server:
        wait_until(lambda: len(server.workers()) == 2)
        wait_until(lambda: all(len(process.threads()) > 1 for process in server.workers()))
        assert server.err == ""
        slow.unlink()
        until_ready(server)
        assert server.ask("GET", "/readyz").status == 200
        server.signal(signal.SIGTERM)
        assert ended_well(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_may_be_ended_before_it_is_ready(tmp_path: Path, plugin: str, number: int) -> None:
    model = write_planted(tmp_path / "colours.planted")
    (tmp_path / "colours.slow").touch()
    with starting(tmp_path / "server", model, "--workers", 2, PYTHONPATH=plugin) as server:
        wait_until(server.workers)
        os.killpg(server.process.pid, number)
        assert ended_well(server)
        assert server.err == ""


def test_numpy_has_the_threads_of_a_worker(tmp_path: Path, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says how many."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with two(tmp_path, onnx) as server:
        assert server.workers()[0].environ()["OPENBLAS_NUM_THREADS"] == str(max(1, available_cpus() // 2))
    with two(tmp_path, onnx, OPENBLAS_NUM_THREADS="3") as server:
        assert server.workers()[0].environ()["OPENBLAS_NUM_THREADS"] == "3"


def test_the_workers_end_with_it(tmp_path: Path, onnx: Path) -> None:
    with two(tmp_path, onnx) as server:
        server.process.kill()
        server.process.wait()
        assert server.leftovers() == []
        assert server.err.count("\n") == 1


def test_what_a_worker_cannot_begin_with_ends_it(tmp_path: Path, onnx: Path) -> None:
    """Told once, however many workers find it."""
    seal(onnx)
    content = onnx.read_bytes()
    onnx.write_bytes(content[:-1] + (b"0" if content[-1:] != b"0" else b"1"))
    with starting(tmp_path / "server", onnx, "--workers", 2) as server:
        assert server.wait() == 2
        assert server.leftovers() == []
        assert server.err.startswith("error: ")
        assert "its seal is broken" in server.err
        assert server.err.count("\n") == 1


def test_a_worker_that_dies_at_once_ends_it(tmp_path: Path, plugin: str) -> None:
    model = write_planted(tmp_path / "colours.planted")
    (tmp_path / "colours.slow").touch()
    with starting(tmp_path / "server", model, "--workers", 2, PYTHONPATH=plugin) as server:
        wait_until(lambda: len(server.workers()) == 2)
        server.workers()[0].kill()
        assert server.wait() == 1
        assert server.leftovers() == []
        assert "ended with -9" in server.err
        assert server.err.count("\n") == 1


# A worker that dies


def test_a_killed_worker_is_replaced(tmp_path: Path, plugin: str) -> None:
    """What it had under way is lost; the others go on."""
    model, slow = write_planted(tmp_path / "colours.planted"), tmp_path / "colours.slow"
    with two(tmp_path, model, PYTHONPATH=plugin) as server:
        pids = answering(server)
        slow.touch()
        clients = [server.connect() for _ in range(8)]
        for client in clients:
            client.send(picture())
        held = wait_for_requests(server, len(clients))
        killed = next(process for process in server.workers() if held[process.pid])
        killed.kill()
        server.wait_for("is replaced: worker ")
        slow.unlink()
        lost = sum(not answers(client) for client in clients)
        assert lost == held[killed.pid]
        server.wait_for("is ready again")
        assert len(answering(server) - pids) == 1
        server.signal(signal.SIGTERM)
        assert ended_well(server)


def wait_for_requests(server: Running, count: int) -> dict[int, int]:
    """The connections that each worker has, once it is so many."""
    held: dict[int, int] = {}

    def look() -> bool:
        for process in server.workers():
            held[process.pid] = sum(entry.status == "ESTABLISHED" for entry in process.net_connections())
        return sum(held.values()) == count

    wait_until(look)
    return held


def answers(client: Client) -> bool:
    with client:
        try:
            return client.answer().status == 200
        except (OSError, EOFError):
            return False


def test_a_worker_is_started_again_and_again(tmp_path: Path, onnx: Path) -> None:
    """Where the next cannot begin, the others serve, and it is tried until it can."""
    with two(tmp_path, onnx) as server:
        good = onnx.read_bytes()
        onnx.write_bytes(b"nothing")
        server.workers()[0].kill()
        server.wait_for("is not an ONNX model", 2)
        assert server.predict().status == 200
        onnx.write_bytes(good)
        server.wait_for("is ready again")
        assert server.end() == 0
        assert server.leftovers() == []


def test_goes_on_where_nobody_reads_what_it_says(tmp_path: Path, onnx: Path) -> None:
    """As after `cifarx serve … 2>&1 | head -1`."""
    reading, writing = os.pipe()
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    command = [PROGRAM, "serve", onnx, "--workers", "1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=writing, stderr=writing)
    os.close(writing)
    server = Running(process, tmp_path)
    try:
        with os.fdopen(reading) as told:
            assert told.readline().startswith("serving colours on ")
        server.port = port
        assert server.predict().status == 200
        killed = server.workers()[0]
        killed.kill()
        assert server.predict().status == 200
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        wait_until(lambda: swapped(server, onnx))
        assert server.end() == 0
    finally:
        server.kill()


def swapped(server: Running, model: Path) -> bool:
    server.signal(signal.SIGHUP)
    return bool(server.predict().json["version"] == file_version(str(model)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_figures_outlive_a_worker(tmp_path: Path, onnx: Path, number: signal.Signals) -> None:
    """One that is killed loses what it counted in its last tenth of a second; one that is told to end loses nothing."""
    with serving(tmp_path / "server", onnx, "--workers", 1) as server:
        for _ in range(3):
            assert server.predict().status == 200
        if number == signal.SIGKILL:
            assert server.ask("GET", "/metrics").status == 200  # for which it is written
        server.workers()[0].send_signal(number)
        server.wait_for("is ready again")
        assert server.predict().status == 200
        line = 'cifarx_requests_total{route="/v1/predict",status="200"} 4.0'
        assert line in server.ask("GET", "/metrics").body.decode().splitlines()


# New versions


def test_a_new_version_is_taken_by_every_worker(tmp_path: Path, onnx: Path) -> None:
    with two(tmp_path, onnx) as server:
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        server.signal(signal.SIGHUP)
        server.wait_for("swapped colours", 2)
        assert {server.predict().json["version"] for _ in range(20)} == {file_version(str(onnx))}


def test_a_new_version_is_asked_for_while_it_starts(tmp_path: Path, plugin: str) -> None:
    """It is taken when the old one is ready."""
    model, slow = write_planted(tmp_path / "colours.planted"), tmp_path / "colours.slow"
    slow.touch()
    with starting(tmp_path / "server", model, "--workers", 2, PYTHONPATH=plugin) as server:
        wait_until(lambda: len(server.workers()) == 2)
        wait_until(lambda: all(len(process.threads()) > 1 for process in server.workers()))
        write_planted(tmp_path / "new.planted", "other").replace(model)
        server.signal(signal.SIGHUP)
        slow.unlink()
        until_ready(server)
        wait_until(lambda: server.predict().json["version"] == file_version(str(model)))
        assert server.end() == 0
        assert "Traceback" not in server.err


def test_watch_takes_a_file_that_changes(tmp_path: Path, onnx: Path) -> None:
    with serving(tmp_path / "server", onnx, "--workers", 1, "--watch") as server:
        version = server.predict().json["version"]
        (tmp_path / "new.onnx").write_bytes(b"nothing")
        (tmp_path / "new.onnx").replace(onnx)
        server.wait_for(f"kept colours {version}")
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        server.wait_for("swapped colours")
        assert server.predict().json["version"] == file_version(str(onnx)) != version
        assert server.end() == 0


# The socket


def test_where_it_cannot_listen() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen on 127\.0\.0\.1 port {port} \(.*in use"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()
    with pytest.raises(UsageError, match="choose another --host"):
        listen("192.0.2.1", 0)  # of no machine


def test_a_hundred_clients_come_at_once(tmp_path: Path, onnx: Path) -> None:
    with two(tmp_path, onnx) as server:
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(server.predict().status)) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 100
