"""A worker alone, as the supervisor starts it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cifarx_serve.files.checksum import seal
from cifarx_serve.server.inference.model import file_version
from cifarx_serve.server.processes.messages import ALL_READY, READY
from cifarx_serve.server.processes.worker import FAILED
from cifarx_serve.server.settings import Settings
from tests.support.color_model import write_onnx
from tests.support.planted_backend import write_planted
from tests.support.running_server import PLANTED, request, wait_until, worker


def planted(folder: Path, **fields: Any) -> Settings:
    model = write_planted(folder / "colours.planted")
    return Settings(files={"colours": str(model)}, registered=(PLANTED,), **fields)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colours.onnx")


def serves(path: Path) -> Settings:
    return Settings(files={"colours": str(path)})


# The beginning


def test_is_ready_once_the_model_has_answered(tmp_path: Path) -> None:
    """The first worker of a server says until then that it is starting."""
    slow = tmp_path / "colours.slow"
    slow.touch()
    with worker(tmp_path / "worker", planted(tmp_path), at_once=True, ready=False) as server:
        assert server.ask("GET", "/healthz").status == 200
        ready, early = server.ask("GET", "/readyz"), server.predict()
        assert (ready.status, ready.json) == (503, {"status": "starting"})
        assert early.status == 503
        assert early.headers["retry-after"] == "1"
        assert "being opened" in early.json["error"]
        slow.unlink()
        assert server.status.readline() == READY
        assert server.predict().status == 200
        assert server.ask("GET", "/readyz").json == {"status": "starting"}  # another worker may still be
        assert server.process.stdin
        server.process.stdin.write(ALL_READY)
        server.process.stdin.flush()
        wait_until(lambda: server.ask("GET", "/readyz").json == {"status": "ready"})
        assert server.end() == 0


def test_one_that_replaces_another_lets_nobody_in_before(tmp_path: Path) -> None:
    """What has come meanwhile is answered then."""
    slow = tmp_path / "colours.slow"
    slow.touch()
    with worker(tmp_path / "worker", planted(tmp_path), ready=False) as server, server.connect() as client:
        client.send(request("GET", "/readyz"))
        client.socket.settimeout(1)
        with pytest.raises(TimeoutError):
            client.answer()
        slow.unlink()
        client.socket.settimeout(60)
        assert client.answer().json == {"status": "ready"}


def test_may_be_ended_before_it_is_ready(tmp_path: Path) -> None:
    """It does not wait for the model."""
    (tmp_path / "colours.slow").touch()
    with worker(tmp_path / "worker", planted(tmp_path), at_once=True, ready=False) as server:
        assert server.ask("GET", "/readyz").status == 503
        assert server.end() == 0
        assert server.err == ""
        assert server.status.read() == b""


def test_says_why_it_cannot_begin(tmp_path: Path, onnx: Path) -> None:
    onnx.write_bytes(b"nothing")
    with worker(tmp_path / "worker", serves(onnx), ready=False) as server:
        problem, remedy = json.loads(server.status.read())
        assert "colours.onnx is not an ONNX model" in problem
        assert remedy
        assert server.wait() == 2
        assert server.err == ""


# The end


def test_ends_with_who_started_it(tmp_path: Path, onnx: Path) -> None:
    with worker(tmp_path / "worker", serves(onnx)) as server:
        assert server.predict().status == 200
        assert server.process.stdin
        server.process.stdin.close()
        assert server.wait() == 0
        assert server.err == ""


def test_leaves_the_keys_of_the_terminal_to_who_started_it(tmp_path: Path, onnx: Path) -> None:
    with worker(tmp_path / "worker", serves(onnx)) as server:
        server.signal(signal.SIGINT)
        assert server.predict().status == 200
        assert server.end() == 0


def test_the_last_lines_are_in_the_log(tmp_path: Path, onnx: Path) -> None:
    with worker(tmp_path / "worker", serves(onnx)) as server:
        for number in range(20):
            server.ask("GET", "/healthz", x_request_id=f"number-{number}")
        assert server.end() == 0
        assert [json.loads(line)["id"] for line in server.out.splitlines()] == [f"number-{n}" for n in range(20)]


@pytest.mark.slow
def test_ends_when_the_model_has_failed_for_good(tmp_path: Path) -> None:
    failing = tmp_path / "colours.failing"
    with worker(tmp_path / "worker", planted(tmp_path)) as server:
        failing.touch()
        assert server.predict().status == 503
        assert server.ask("GET", "/readyz").json == {"status": "failed"}
        assert server.ask("GET", "/healthz").status == 200
        failing.unlink()
        wait_until(lambda: server.ask("GET", "/readyz").status == 200)  # it was tried once more
        failing.touch()
        assert server.predict().status == 503
        assert server.wait() == FAILED


# New versions


def test_takes_a_new_version(tmp_path: Path, onnx: Path) -> None:
    with worker(tmp_path / "worker", serves(onnx)) as server:
        before = server.predict().json
        assert before["version"] == file_version(str(onnx))
        assert before["predictions"][0]["label"] == "red"
        write_onnx(tmp_path / "new.onnx", order=(2, 1, 0)).replace(onnx)
        server.signal(signal.SIGHUP)
        server.wait_for("swapped colours")
        after = server.predict().json
        assert after["version"] == file_version(str(onnx)) != before["version"]
        assert after["predictions"][0]["label"] == "blue"
        line = f"worker {server.process.pid} swapped colours from {before['version']} to {after['version']}\n"
        assert server.err == f"note: {line}"


def test_keeps_the_old_version_where_the_new_is_none(tmp_path: Path, onnx: Path) -> None:
    with worker(tmp_path / "worker", serves(onnx)) as server:
        version = server.predict().json["version"]
        seal(onnx)
        sealed = onnx.read_bytes()
        broken = [b"nothing", sealed[:100] + b"\0" + sealed[101:], None]
        for number, content in enumerate(broken, 1):
            if content is None:
                onnx.unlink()
            else:
                (tmp_path / "new.onnx").write_bytes(content)
                (tmp_path / "new.onnx").replace(onnx)
            server.signal(signal.SIGHUP)
            server.wait_for(f"kept colours {version}: ", number)
            assert server.predict().json["version"] == version
        assert server.ask("GET", "/readyz").status == 200
        assert server.err.count("\n") == len(broken)
        write_onnx(onnx, order=(2, 1, 0))
        server.signal(signal.SIGHUP)
        server.wait_for("swapped colours")


def test_the_same_version_is_left_as_it_is(tmp_path: Path, onnx: Path) -> None:
    with worker(tmp_path / "worker", serves(onnx)) as server:
        opened = server.ask("GET", "/v1/models").json["models"][0]["loaded_at"]
        server.signal(signal.SIGHUP)
        assert server.predict().status == 200
        assert server.end() == 0
        assert server.err == ""
        assert opened


def test_a_request_is_answered_by_the_version_that_it_came_to(tmp_path: Path) -> None:
    slow = tmp_path / "colours.slow"
    settings = planted(tmp_path)
    with worker(tmp_path / "worker", settings) as server, server.connect() as client:
        slow.touch()
        client.send(request("GET", "/readyz"))
        assert client.answer().status == 200
        client.send(request("POST", "/v1/predict", b"P6 1 1 255 abc", content_type="image/x-portable-pixmap"))
        old = file_version(settings.files["colours"])
        write_planted(tmp_path / "new.planted", "other").replace(settings.files["colours"])
        server.signal(signal.SIGHUP)
        assert server.ask("GET", "/readyz").status == 200
        slow.unlink()
        server.wait_for("swapped colours")
        assert client.answer().json["version"] == old
        assert server.predict().json["version"] != old
