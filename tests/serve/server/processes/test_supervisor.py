"""The `cifarx serve` program with its supervisor and workers."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.server.inference.model import file_version
from cifarx_serve.server.processes.supervisor import listen
from cifarx_serve.system.cpus import available_cpus
from tests.support.color_model import write_onnx
from tests.support.endless_model import write_endless_model
from tests.support.faulty_backend import write_faulty_model
from tests.support.server_process import (
    PROGRAM,
    Client,
    ServerProcess,
    encode_request,
    predict_request,
    run_server,
    start_server,
    wait_until,
    wait_until_ready,
)

# Each test starts a server with several processes, which takes about a second.
pytestmark = pytest.mark.slow


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """A PYTHONPATH on which the faulty backend is offered as a package would offer it."""
    metadata = tmp_path / "plugin" / "faulty-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[cifarx.backends]\nfaulty = tests.support.faulty_backend:FaultyBackend\n"
    )
    return os.pathsep.join((str(metadata.parent), str(Path(__file__).parents[4])))


@contextmanager
def two_workers(tmp_path: Path, model: Path, *options: object, **environment: str) -> Iterator[ServerProcess]:
    with run_server(tmp_path / "server", model, "--workers", 2, *options, **environment) as server:
        yield server


def stopped_cleanly(server: ServerProcess) -> bool:
    return server.wait() == 0 and not server.leftovers() and "Traceback" not in server.err


def wait_for_both_workers(server: ServerProcess) -> set[int]:
    """Send requests until both workers have answered one, and return their process IDs."""
    pids: set[int] = set()

    def both_answered() -> bool:
        server.predict()
        wait_until(lambda: server.out.endswith("\n"))
        pids.update(process.pid for process in server.workers() if f'"worker":{process.pid}' in server.out)
        return len(pids) == 2

    wait_until(both_answered)
    return pids


# Start and stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server(tmp_path: Path, onnx: Path, number: int) -> None:
    """No process and no temporary file is left behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with two_workers(tmp_path, onnx, TMPDIR=str(temporary)) as server, server.connect() as client:
        client.send(encode_request("GET", "/healthz"))
        assert client.read_response().status == 200
        assert list(temporary.glob("cifarx-serve-*/*.db"))
        server.signal(number)
        assert stopped_cleanly(server)
        assert client.is_closed()
        assert not list(temporary.glob("cifarx*"))
        assert server.err.count("\n") == 1


def test_ctrl_c_stops_the_server(tmp_path: Path, onnx: Path) -> None:
    """Ctrl-C sends SIGINT to every process of the terminal."""
    with two_workers(tmp_path, onnx) as server:
        os.killpg(server.process.pid, signal.SIGINT)
        assert stopped_cleanly(server)


def test_is_ready_when_all_models_are_open(tmp_path: Path, plugin: str) -> None:
    """The URL is printed then, and not before."""
    model, slow = write_faulty_model(tmp_path / "colors.faulty"), tmp_path / "colors.slow"
    slow.touch()
    with start_server(tmp_path / "server", model, "--workers", 2, PYTHONPATH=plugin) as server:
        wait_until(lambda: len(server.workers()) == 2)
        wait_until(lambda: all(len(process.threads()) > 1 for process in server.workers()))
        assert server.err == ""
        slow.unlink()
        wait_until_ready(server)
        assert server.request("GET", "/readyz").status == 200
        server.signal(signal.SIGTERM)
        assert stopped_cleanly(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_before_it_is_ready(tmp_path: Path, plugin: str, number: int) -> None:
    model = write_faulty_model(tmp_path / "colors.faulty")
    (tmp_path / "colors.slow").touch()
    with start_server(tmp_path / "server", model, "--workers", 2, PYTHONPATH=plugin) as server:
        wait_until(server.workers)
        os.killpg(server.process.pid, number)
        assert stopped_cleanly(server)
        assert server.err == ""


def test_limits_the_threads_of_numpy(tmp_path: Path, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that the user sets is kept."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with two_workers(tmp_path, onnx) as server:
        assert server.workers()[0].environ()["OPENBLAS_NUM_THREADS"] == str(max(1, available_cpus() // 2))
    with two_workers(tmp_path, onnx, OPENBLAS_NUM_THREADS="3") as server:
        assert server.workers()[0].environ()["OPENBLAS_NUM_THREADS"] == "3"


def test_the_workers_stop_when_the_supervisor_is_killed(tmp_path: Path, onnx: Path) -> None:
    with two_workers(tmp_path, onnx) as server:
        server.process.kill()
        server.process.wait()
        assert server.leftovers() == []
        assert server.err.count("\n") == 1


def test_an_error_at_the_start_of_a_worker_stops_the_server(tmp_path: Path, onnx: Path) -> None:
    """The error is printed once, although all workers report it."""
    write_checksum(onnx)
    content = onnx.read_bytes()
    onnx.write_bytes(content[:-1] + (b"0" if content[-1:] != b"0" else b"1"))
    with start_server(tmp_path / "server", onnx, "--workers", 2) as server:
        assert server.wait() == 2
        assert server.leftovers() == []
        assert server.err.startswith("error: ")
        assert f"the checksum of {onnx} does not match" in server.err
        assert server.err.count("\n") == 1


def test_a_worker_killed_before_it_is_ready_stops_the_server(tmp_path: Path, plugin: str) -> None:
    model = write_faulty_model(tmp_path / "colors.faulty")
    (tmp_path / "colors.slow").touch()
    with start_server(tmp_path / "server", model, "--workers", 2, PYTHONPATH=plugin) as server:
        wait_until(lambda: len(server.workers()) == 2)
        server.workers()[0].kill()
        assert server.wait() == 1
        assert server.leftovers() == []
        assert "exited with status -9: see its output" in server.err
        assert server.err.count("\n") == 1


# Restart of a worker


def test_restarts_a_killed_worker(tmp_path: Path, plugin: str) -> None:
    """Only its own requests are lost; the other worker answers its own."""
    model, slow = write_faulty_model(tmp_path / "colors.faulty"), tmp_path / "colors.slow"
    with two_workers(tmp_path, model, PYTHONPATH=plugin) as server:
        pids = wait_for_both_workers(server)
        slow.touch()
        clients = [server.connect() for _ in range(8)]
        for client in clients:
            client.send(predict_request())
        connections = wait_for_connections(server, len(clients))
        killed = next(process for process in server.workers() if connections[process.pid])
        killed.kill()
        server.wait_for("note: restarting worker ")
        slow.unlink()
        lost = sum(not gets_prediction(client) for client in clients)
        assert lost == connections[killed.pid]
        server.wait_for("is ready again")
        assert len(wait_for_both_workers(server) - pids) == 1
        server.signal(signal.SIGTERM)
        assert stopped_cleanly(server)


def wait_for_connections(server: ServerProcess, count: int) -> dict[int, int]:
    """Wait until the workers have `count` connections, and return the number of each by process ID."""
    connections: dict[int, int] = {}

    def all_connected() -> bool:
        for process in server.workers():
            connections[process.pid] = sum(entry.status == "ESTABLISHED" for entry in process.net_connections())
        return sum(connections.values()) == count

    wait_until(all_connected)
    return connections


def gets_prediction(client: Client) -> bool:
    with client:
        try:
            return client.read_response().status == 200
        except (OSError, EOFError):
            return False


def test_restarts_a_worker_until_it_can_start(tmp_path: Path, onnx: Path) -> None:
    """The other worker serves in the meantime."""
    with two_workers(tmp_path, onnx) as server:
        content = onnx.read_bytes()
        onnx.write_bytes(b"nothing")
        server.workers()[0].kill()
        server.wait_for("is not a valid ONNX model", 2)
        assert server.predict().status == 200
        onnx.write_bytes(content)
        server.wait_for("is ready again")
        assert server.stop() == 0
        assert server.leftovers() == []


def test_a_worker_that_exits_again_and_again_keeps_no_cpu_busy(tmp_path: Path, onnx: Path) -> None:
    """The other worker serves, and the one that exits as soon as it is ready is started less and less often."""
    with two_workers(tmp_path, onnx) as server:
        started = time.monotonic()
        for restarts in range(1, 5):
            server.workers()[-1].kill()  # the one that started last
            server.wait_for("is ready again", restarts)
            assert server.predict().status == 200
        assert time.monotonic() - started > 0.25 + 0.5 + 1.0
        assert server.stop() == 0


def test_serves_on_when_its_output_is_closed(tmp_path: Path, onnx: Path) -> None:
    """Close the server's output after one line, as `cifarx serve … 2>&1 | head -1` does."""
    read_fd, write_fd = os.pipe()
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    command: list[str | Path] = [PROGRAM, "serve", onnx, "--workers", "1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=write_fd, stderr=write_fd)
    os.close(write_fd)
    server = ServerProcess(process, tmp_path)
    try:
        with os.fdopen(read_fd) as output:
            assert output.readline().startswith("serving colors on ")
        server.port = port
        assert server.predict().status == 200
        server.workers()[0].kill()
        assert server.predict().status == 200
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        wait_until(lambda: reloads(server, onnx))
        assert server.stop() == 0
    finally:
        server.kill()


def reloads(server: ServerProcess, model: Path) -> bool:
    server.signal(signal.SIGHUP)
    return bool(server.predict().json["version"] == file_version(str(model)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_keeps_the_counters_of_a_restarted_worker(tmp_path: Path, onnx: Path, number: signal.Signals) -> None:
    """A killed worker loses what it counted in its last tenth of a second; a terminated one loses nothing."""
    with run_server(tmp_path / "server", onnx, "--workers", 1) as server:
        for _ in range(3):
            assert server.predict().status == 200
        if number == signal.SIGKILL:
            assert server.request("GET", "/metrics").status == 200  # writes the counters
        server.workers()[0].send_signal(number)
        server.wait_for("is ready again")
        assert server.predict().status == 200
        line = 'cifarx_requests_total{route="/v1/predict",status="200"} 4.0'
        assert line in server.request("GET", "/metrics").body.decode().splitlines()


# Reload


def test_every_worker_reloads_a_new_version(tmp_path: Path, onnx: Path) -> None:
    with two_workers(tmp_path, onnx) as server:
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        server.signal(signal.SIGHUP)
        server.wait_for("reloaded colors", 2)
        assert {server.predict().json["version"] for _ in range(20)} == {file_version(str(onnx))}


def test_a_reload_during_the_start_follows_it(tmp_path: Path, plugin: str) -> None:
    model, slow = write_faulty_model(tmp_path / "colors.faulty"), tmp_path / "colors.slow"
    slow.touch()
    with start_server(tmp_path / "server", model, "--workers", 2, PYTHONPATH=plugin) as server:
        wait_until(lambda: len(server.workers()) == 2)
        wait_until(lambda: all(len(process.threads()) > 1 for process in server.workers()))
        write_faulty_model(tmp_path / "new.faulty", "other").replace(model)
        server.signal(signal.SIGHUP)
        slow.unlink()
        wait_until_ready(server)
        wait_until(lambda: server.predict().json["version"] == file_version(str(model)))
        assert server.stop() == 0
        assert "Traceback" not in server.err


def test_watch_reloads_a_changed_file(tmp_path: Path, onnx: Path) -> None:
    with run_server(tmp_path / "server", onnx, "--workers", 1, "--watch") as server:
        version = server.predict().json["version"]
        (tmp_path / "new.onnx").write_bytes(b"nothing")
        (tmp_path / "new.onnx").replace(onnx)
        server.wait_for(f"kept colors at version {version}: ")
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        server.wait_for("reloaded colors")
        assert server.predict().json["version"] == file_version(str(onnx)) != version
        assert server.stop() == 0


# The socket


def test_listen_rejects_an_address_that_cannot_be_used() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen on 127\.0\.0\.1 port {port} \(.*in use"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()
    with pytest.raises(UsageError, match="choose another --host"):
        listen("192.0.2.1", 0)  # an address for documentation, which no machine has


def test_answers_a_hundred_clients_at_once(tmp_path: Path, onnx: Path) -> None:
    with two_workers(tmp_path, onnx) as server:
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(server.predict().status)) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 100


# What never ends


def test_a_reload_goes_on_after_a_model_that_never_returns(tmp_path: Path, onnx: Path) -> None:
    version = file_version(str(onnx))
    with two_workers(tmp_path, onnx, "--load-timeout-s", 2) as server:
        write_endless_model(tmp_path / "new.onnx").replace(onnx)
        server.signal(signal.SIGHUP)
        server.wait_for(f"kept colors at version {version}: ", 2)
        assert "has not run a batch of its warm-up within 2 s: raise --load-timeout-s" in server.err
        assert server.predict().status == 200
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        server.signal(signal.SIGHUP)
        server.wait_for("reloaded colors from version", 2)
        assert server.predict().json["predictions"][0]["label"] == "blue"
        server.signal(signal.SIGTERM)
        assert stopped_cleanly(server)


def test_a_server_whose_model_never_returns_does_not_start(tmp_path: Path) -> None:
    path = write_endless_model(tmp_path / "endless.onnx")
    with start_server(tmp_path / "server", path, "--workers", 2, "--load-timeout-s", 2) as server:
        assert server.wait() == 2
        assert server.err == (f"error: {path} has not run a batch of its warm-up within 2 s: raise --load-timeout-s\n")
        assert not server.leftovers()


def test_a_worker_whose_event_loop_does_not_run_is_replaced(tmp_path: Path, onnx: Path) -> None:
    """A suspended server keeps its workers: they are silent, but they do not hang.

    Its clock goes on, as under `docker pause`. It is another server, suspended while the worker of the first one hangs.
    """
    with (
        two_workers(tmp_path, onnx) as server,
        run_server(tmp_path / "suspended", onnx, "--workers", 2) as suspended,
    ):
        supervisor, workers = psutil.Process(suspended.process.pid), suspended.workers()
        for process in (supervisor, *workers):
            process.suspend()
        since = time.monotonic()

        hanging = server.workers()[0]
        hanging.suspend()
        server.wait_for("has not responded for 30 s")
        server.wait_for("is ready again")
        assert not hanging.is_running()
        assert len(server.workers()) == 2
        server.signal(signal.SIGTERM)
        assert stopped_cleanly(server)

        time.sleep(max(0, since + 32 - time.monotonic()))  # longer than a worker may be silent
        for process in (supervisor, *workers):
            process.resume()
            time.sleep(0.2)  # the supervisor runs before the workers can say anything
        assert suspended.predict().status == 200
        assert suspended.workers() == workers
        assert "has not responded" not in suspended.err
        suspended.signal(signal.SIGTERM)
        assert stopped_cleanly(suspended)
