"""The figures as a scraper reads them, of one process and of several that share a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cifarx_serve.server.inference.batcher import Batch
from cifarx_serve.server.inference.metrics import CONTENT_TYPE, Metrics
from cifarx_serve.server.settings import SHARED_FIGURES


def figures(page: bytes) -> dict[tuple[str, ...], float]:
    """Values by the sample's name and its labels' values, a bucket's bound last."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items(), key=lambda label: label[0] == "le"))): (
            sample.value
        )
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics()
    for status, cause in [(200, None), (200, None), (404, "not_found")]:
        metrics.request("/v1/predict", status, 0.003, cause)
    metrics.request("/healthz", 200, 0.0001, None)
    found = figures(metrics.page())
    assert found["cifarx_requests_total", "/v1/predict", "200"] == 2
    assert found["cifarx_requests_total", "/v1/predict", "404"] == 1
    assert found["cifarx_requests_total", "/healthz", "200"] == 1
    assert found["cifarx_errors_total", "not_found"] == 1
    assert found["cifarx_request_seconds_count", "/v1/predict"] == 3
    assert found["cifarx_request_seconds_sum", "/v1/predict"] == pytest.approx(0.009)
    assert found["cifarx_request_seconds_bucket", "/v1/predict", "0.0025"] == 0
    assert found["cifarx_request_seconds_bucket", "/v1/predict", "0.004"] == 3


def test_calls_of_a_model_are_counted() -> None:
    metrics = Metrics()
    told, other = metrics.of_model("lzh_9"), metrics.of_model("other")
    told(Batch(3, 5, (0.001, 0.002), 0.01))
    told(Batch(64, 2, (0.5,), 0.02))
    other(Batch(1, 0, (0.0,), 0.03))
    found = figures(metrics.page())
    assert found["cifarx_batch_images_count", "lzh_9"] == 2
    assert found["cifarx_batch_images_sum", "lzh_9"] == 67
    assert found["cifarx_batch_images_bucket", "lzh_9", "4.0"] == 1
    assert found["cifarx_queue_seconds_count", "lzh_9"] == 3
    assert found["cifarx_queue_seconds_sum", "lzh_9"] == pytest.approx(0.503)
    assert found["cifarx_compute_seconds_sum", "lzh_9"] == pytest.approx(0.03)
    assert found["cifarx_queue_images", "lzh_9"] == 2
    assert found["cifarx_batch_images_sum", "other"] == 1


def test_one_process_has_no_figures_of_another_server() -> None:
    Metrics().request("/v1/predict", 200, 1.0, None)
    assert ("cifarx_requests_total", "/v1/predict", "200") not in figures(Metrics().page())


def test_the_page_is_prometheus_text() -> None:
    page = Metrics().page().decode()
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")
    for name in ("requests_total counter", "request_seconds histogram", "queue_images gauge", "errors_total counter"):
        assert f"# TYPE cifarx_{name}" in page


_WORKER = """
import asyncio, sys
from cifarx_serve.server.inference.batcher import Batch
from cifarx_serve.server.inference.metrics import Metrics
metrics = Metrics()
told = metrics.of_model("lzh_9")

async def count():
    for line in sys.stdin:
        if line == "page\\n":
            page = metrics.page()
            print(len(page), flush=True)
            sys.stdout.buffer.write(page)
            sys.stdout.flush()
        else:
            metrics.request("/v1/predict", 200, 0.003, None)
            told(Batch(int(line), int(line), (0.001,), 0.01))
            metrics.write()
            print("counted", flush=True)

asyncio.run(count())
"""


class Worker:
    """A process that counts."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-W", "error", "-c", _WORKER]
        environment = os.environ | {SHARED_FIGURES: str(folder)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout

    def count(self, images: int) -> None:
        self._in.write(b"%d\n" % images)
        self._in.flush()
        assert self._out.readline() == b"counted\n"

    def figures(self) -> dict[tuple[str, ...], float]:
        self._in.write(b"page\n")
        self._in.flush()
        return figures(self._out.read(int(self._out.readline())))

    def end(self) -> None:
        self._in.close()
        self._out.close()
        assert self.process.wait(20) == 0


def test_every_process_shows_the_figures_of_all(tmp_path: Path) -> None:
    """Of those that have ended too, but for what waits there."""
    first, second = Worker(tmp_path), Worker(tmp_path)
    first.count(3)
    second.count(5)
    second.count(7)
    for worker in (first, second):
        found = worker.figures()
        assert found["cifarx_requests_total", "/v1/predict", "200"] == 3
        assert found["cifarx_batch_images_sum", "lzh_9"] == 15
        assert found["cifarx_request_seconds_bucket", "/v1/predict", "0.004"] == 3
        assert found["cifarx_queue_images", "lzh_9"] == 10
    second.end()
    third = Worker(tmp_path)
    third.count(1)
    found = third.figures()
    assert found["cifarx_requests_total", "/v1/predict", "200"] == 4
    assert found["cifarx_batch_images_sum", "lzh_9"] == 16
    first.end()
    third.end()
