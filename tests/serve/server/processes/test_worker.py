"""One worker, started as the supervisor starts it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.server.inference.model import file_version
from cifarx_serve.server.processes.messages import ALIVE, ALL_READY, READY
from cifarx_serve.server.processes.worker import EXIT_MODEL_FAILED
from cifarx_serve.server.settings import Settings
from tests.support.color_model import write_onnx
from tests.support.faulty_backend import write_faulty_model
from tests.support.server_process import FAULTY_BACKEND, encode_request, predict_request, run_worker, wait_until


def faulty_settings(directory: Path, **fields: Any) -> Settings:
    model = write_faulty_model(directory / "colors.faulty")
    return Settings(files={"colors": str(model)}, registered_backends=(FAULTY_BACKEND,), **fields)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


def onnx_settings(path: Path) -> Settings:
    return Settings(files={"colors": str(path)})


# Start


def test_a_first_worker_accepts_requests_while_its_model_is_opening(tmp_path: Path) -> None:
    """Until all workers are ready, it reports that it is starting."""
    slow = tmp_path / "colors.slow"
    slow.touch()
    with run_worker(tmp_path / "worker", faulty_settings(tmp_path), accept_while_opening=True, wait=False) as worker:
        assert worker.request("GET", "/healthz").status == 200
        ready, early = worker.request("GET", "/readyz"), worker.predict()
        assert (ready.status, ready.json) == (503, {"status": "starting"})
        assert early.status == 503
        assert early.headers["retry-after"] == "1"
        assert early.json["error"] == "model colors is still loading: try again in a second"
        slow.unlink()
        assert worker.status.readline() == READY
        assert worker.predict().status == 200
        assert worker.request("GET", "/readyz").json == {"status": "starting"}  # other workers may not be ready
        assert worker.process.stdin
        worker.process.stdin.write(ALL_READY)
        worker.process.stdin.flush()
        wait_until(lambda: worker.request("GET", "/readyz").json == {"status": "ready"})
        assert worker.stop() == 0


def test_a_restarted_worker_accepts_no_requests_before_it_is_ready(tmp_path: Path) -> None:
    """A connection that waits in the meantime is answered afterwards."""
    slow = tmp_path / "colors.slow"
    slow.touch()
    with run_worker(tmp_path / "worker", faulty_settings(tmp_path), wait=False) as worker, worker.connect() as client:
        client.send(encode_request("GET", "/readyz"))
        client.socket.settimeout(1)
        with pytest.raises(TimeoutError):
            client.read_response()
        slow.unlink()
        client.socket.settimeout(60)
        assert client.read_response().json == {"status": "ready"}


def test_stops_while_its_model_is_opening(tmp_path: Path) -> None:
    (tmp_path / "colors.slow").touch()
    with run_worker(tmp_path / "worker", faulty_settings(tmp_path), accept_while_opening=True, wait=False) as worker:
        assert worker.request("GET", "/readyz").status == 503
        assert worker.stop() == 0
        assert worker.err == ""
        assert worker.status.read().replace(ALIVE, b"") == b""


def test_reports_why_it_cannot_start(tmp_path: Path, onnx: Path) -> None:
    onnx.write_bytes(b"nothing")
    with run_worker(tmp_path / "worker", onnx_settings(onnx), wait=False) as worker:
        problem, remedy = json.loads(worker.status.read())
        assert "colors.onnx is not a valid ONNX model" in problem
        assert remedy
        assert worker.wait() == 2
        assert worker.err == ""


# Stop


def test_stops_when_the_supervisor_exits(tmp_path: Path, onnx: Path) -> None:
    with run_worker(tmp_path / "worker", onnx_settings(onnx)) as worker:
        assert worker.predict().status == 200
        assert worker.process.stdin
        worker.process.stdin.close()
        assert worker.wait() == 0
        assert worker.err == ""


def test_leaves_sigint_to_the_supervisor(tmp_path: Path, onnx: Path) -> None:
    with run_worker(tmp_path / "worker", onnx_settings(onnx)) as worker:
        worker.signal(signal.SIGINT)
        assert worker.predict().status == 200
        assert worker.stop() == 0


def test_flushes_the_access_log(tmp_path: Path, onnx: Path) -> None:
    with run_worker(tmp_path / "worker", onnx_settings(onnx)) as worker:
        for number in range(20):
            worker.request("GET", "/healthz", x_request_id=f"request-{number}")
        assert worker.stop() == 0
        assert [json.loads(line)["id"] for line in worker.out.splitlines()] == [f"request-{n}" for n in range(20)]


@pytest.mark.slow
def test_exits_when_its_model_has_failed_for_good(tmp_path: Path) -> None:
    failing = tmp_path / "colors.failing"
    with run_worker(tmp_path / "worker", faulty_settings(tmp_path)) as worker:
        failing.touch()
        assert worker.predict().status == 503
        assert worker.request("GET", "/readyz").json == {"status": "failed"}
        assert worker.request("GET", "/healthz").status == 200
        failing.unlink()
        wait_until(lambda: worker.request("GET", "/readyz").status == 200)  # a recheck succeeds
        failing.touch()
        assert worker.predict().status == 503
        assert worker.wait() == EXIT_MODEL_FAILED


# Reload


def test_reloads_a_new_version(tmp_path: Path, onnx: Path) -> None:
    with run_worker(tmp_path / "worker", onnx_settings(onnx)) as worker:
        before = worker.predict().json
        assert before["version"] == file_version(str(onnx))
        assert before["predictions"][0]["label"] == "red"
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        worker.signal(signal.SIGHUP)
        worker.wait_for("reloaded colors")
        after = worker.predict().json
        assert after["version"] == file_version(str(onnx)) != before["version"]
        assert after["predictions"][0]["label"] == "blue"
        event = f"reloaded colors from version {before['version']} to {after['version']}"
        assert worker.err == f"note: worker {worker.process.pid} {event}\n"


def test_keeps_the_old_version_if_the_new_one_is_invalid(tmp_path: Path, onnx: Path) -> None:
    with run_worker(tmp_path / "worker", onnx_settings(onnx)) as worker:
        version = worker.predict().json["version"]
        write_checksum(onnx)
        content = onnx.read_bytes()
        invalid = [b"nothing", content[:100] + b"\0" + content[101:], None]
        for number, new_content in enumerate(invalid, 1):
            if new_content is None:
                onnx.unlink()
            else:
                (tmp_path / "new.onnx").write_bytes(new_content)
                (tmp_path / "new.onnx").replace(onnx)
            worker.signal(signal.SIGHUP)
            worker.wait_for(f"kept colors at version {version}: ", number)
            assert worker.predict().json["version"] == version
        assert worker.request("GET", "/readyz").status == 200
        assert worker.err.count("\n") == len(invalid)
        write_onnx(onnx, order=(2, 1, 0))
        worker.signal(signal.SIGHUP)
        worker.wait_for("reloaded colors")


def test_does_not_reload_an_unchanged_file(tmp_path: Path, onnx: Path) -> None:
    with run_worker(tmp_path / "worker", onnx_settings(onnx)) as worker:
        loaded_at = worker.request("GET", "/v1/models").json["models"][0]["loaded_at"]
        worker.signal(signal.SIGHUP)
        assert worker.predict().status == 200
        assert worker.stop() == 0
        assert worker.err == ""
        assert loaded_at


def test_a_request_gets_the_response_of_the_version_that_it_was_queued_for(tmp_path: Path) -> None:
    slow = tmp_path / "colors.slow"
    settings = faulty_settings(tmp_path)
    with run_worker(tmp_path / "worker", settings) as worker, worker.connect() as client:
        slow.touch()
        client.send(encode_request("GET", "/readyz"))
        assert client.read_response().status == 200
        client.send(predict_request())
        old = file_version(settings.files["colors"])
        write_faulty_model(tmp_path / "new.faulty", "other").replace(settings.files["colors"])
        worker.signal(signal.SIGHUP)
        assert worker.request("GET", "/readyz").status == 200
        slow.unlink()
        worker.wait_for("reloaded colors")
        assert client.read_response().json["version"] == old
        assert worker.predict().json["version"] != old
