"""Images that take forever or gigabytes, sent to a running server that answers good requests at the same time."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from cifarx_serve.server.http.body_budget import MAX_BODIES
from tests.support.asgi_client import encode_image
from tests.support.color_model import write_onnx
from tests.support.hostile_images import decode_bombs, jpeg_of_scans
from tests.support.server_process import Response, ServerProcess, run_server, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform == "win32", reason="a worker is a POSIX process"),
]

SMALL = encode_image(Image.new("RGB", (9, 7), "red"), "PNG")
LARGE = encode_image(Image.new("RGB", (900, 700), "red"), "WEBP")
MEBIBYTE = 1 << 20


@contextmanager
def server(tmp_path: Path, *options: object) -> Iterator[ServerProcess]:
    model = write_onnx(tmp_path / "colors.onnx")
    options = (*options, "--workers", 1, "--device", "cpu", "--max-pixels", 1_000_000)
    with run_server(tmp_path / "server", model, *options) as started:
        yield started


def predict(server: ServerProcess, data: bytes) -> Response:
    return server.request("POST", "/v1/predict", data, content_type="image/png")


def label(response: Response) -> str:
    assert response.status == 200, response.body
    name: str = response.json["predictions"][0]["label"]
    return name


def processes(server: ServerProcess) -> list[psutil.Process]:
    """Return the worker and its child processes."""
    (worker,) = server.workers()
    return [worker, *worker.children(recursive=True)]


def memory(server: ServerProcess) -> int:
    return sum(process.memory_info().rss for process in processes(server))


@contextmanager
def suspended_decoders(server: ServerProcess) -> Iterator[None]:
    """Suspend all processes that decode, and those that replace them, as if every image took forever."""
    stop = threading.Event()

    def suspend() -> None:
        for process in processes(server)[1:]:
            with suppress(psutil.NoSuchProcess):  # it has just been killed
                process.suspend()

    def keep_suspending() -> None:
        while not stop.wait(0.05):
            suspend()

    suspend()
    suspending = threading.Thread(target=keep_suspending)
    suspending.start()
    try:
        yield
    finally:
        stop.set()
        suspending.join()
        for process in processes(server)[1:]:
            process.resume()


def test_bombs_are_refused_while_good_images_are_answered(tmp_path: Path) -> None:
    with server(tmp_path) as started:
        assert label(predict(started, LARGE)) == "red"
        before, known = memory(started), processes(started)
        done = threading.Event()
        answered: list[float] = []

        def ask() -> None:
            while not done.is_set():
                asked = time.monotonic()
                assert label(predict(started, SMALL)) == "red"
                assert started.request("GET", "/healthz").status == 200
                answered.append(time.monotonic() - asked)

        asking = threading.Thread(target=ask)
        asking.start()
        for kind, data in decode_bombs().items():
            response = predict(started, data)
            assert 400 <= response.status < 500, (kind, response)
        done.set()
        asking.join()
        assert len(answered) > 20
        assert processes(started) == known, "no process had to be killed"
        assert memory(started) - before < 64 * MEBIBYTE
        assert label(predict(started, LARGE)) == "red"
        assert started.stop() == 0
        assert not started.leftovers()


def test_jpegs_of_thousands_of_scans_do_not_keep_the_server_busy(tmp_path: Path) -> None:
    with server(tmp_path) as started:
        assert label(predict(started, LARGE)) == "red"
        for _ in range(5):
            assert predict(started, jpeg_of_scans(8000)).status == 400
        assert label(predict(started, LARGE)) == "red"
        assert started.request("GET", "/readyz").json == {"status": "ready"}
        assert started.request("GET", "/metrics").status == 200


def test_probes_and_metrics_do_not_wait_for_a_stuck_pool(tmp_path: Path) -> None:
    with server(tmp_path, "--deadline-ms", 60_000) as started:
        assert label(predict(started, LARGE)) == "red"
        done = threading.Event()

        def keep_asking() -> None:  # a process that has just been started may answer before it is suspended
            while not done.is_set():
                predict(started, LARGE)

        waiting = [threading.Thread(target=keep_asking) for _ in range(6)]
        with suspended_decoders(started):
            for thread in waiting:
                thread.start()
            wait_until(lambda: started.request("GET", "/readyz").json == {"status": "overloaded"})
            assert started.request("GET", "/readyz").status == 503
            assert started.request("GET", "/v2/health/ready").json == {"ready": False}
            for path in ("/healthz", "/metrics", "/v2/health/live"):
                asked = time.monotonic()
                assert started.request("GET", path).status == 200
                assert time.monotonic() - asked < 5.0
            assert label(predict(started, SMALL)) == "red"
            done.set()
        for thread in waiting:
            thread.join()
        assert started.request("GET", "/readyz").json == {"status": "ready"}


def test_the_deadline_kills_the_process_and_the_next_image_gets_another(tmp_path: Path) -> None:
    with server(tmp_path, "--deadline-ms", 3000) as started:
        wait_until(
            lambda: predict(started, LARGE).status == 200
        )  # starting a process may take longer than the deadline
        (decoder,) = processes(started)[1:]
        decoder.suspend()
        assert predict(started, LARGE).status == 504
        assert not decoder.is_running()
        wait_until(lambda: predict(started, LARGE).status == 200)


def test_bodies_of_requests_that_timed_out_are_not_kept(tmp_path: Path) -> None:
    """The budget of eight bodies bounds what the worker holds, however many requests come and time out."""
    body_mb = 4
    body = LARGE + bytes(body_mb * MEBIBYTE - len(LARGE) - 1)
    with server(tmp_path, "--deadline-ms", 1500, "--max-body-mb", body_mb) as started:
        wait_until(lambda: predict(started, LARGE).status == 200)
        before = memory(started)
        statuses: list[int] = []
        with suspended_decoders(started):
            for _ in range(4):
                clients = [
                    threading.Thread(target=lambda: statuses.append(predict(started, body).status)) for _ in range(12)
                ]
                for client in clients:
                    client.start()
                for client in clients:
                    client.join()
        assert set(statuses) <= {503, 504}
        assert 504 in statuses
        assert memory(started) - before < (MAX_BODIES * body_mb + 64) * MEBIBYTE
        wait_until(lambda: predict(started, LARGE).status == 200)
        lines = [json.loads(line) for line in started.out.splitlines()]
        assert not [line for line in lines if line.get("cause") == "internal"]
