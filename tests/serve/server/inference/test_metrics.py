"""Metrics as a scraper reads them, of one process and of several processes that share a directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cifarx_serve.server.inference.batcher import BatchEvent
from cifarx_serve.server.inference.metrics import CONTENT_TYPE, Metrics
from cifarx_serve.server.settings import PROMETHEUS_MULTIPROC_DIR


def parse(page: bytes) -> dict[tuple[str, ...], float]:
    """Return the values by the name and the labels of each sample; the bound of a bucket comes last."""
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
        metrics.observe_request("/v1/predict", status, 0.003, cause)
    metrics.observe_request("/healthz", 200, 0.0001, None)
    values = parse(metrics.render())
    assert values["cifarx_requests_total", "/v1/predict", "200"] == 2
    assert values["cifarx_requests_total", "/v1/predict", "404"] == 1
    assert values["cifarx_requests_total", "/healthz", "200"] == 1
    assert values["cifarx_errors_total", "not_found"] == 1
    assert values["cifarx_request_seconds_count", "/v1/predict"] == 3
    assert values["cifarx_request_seconds_sum", "/v1/predict"] == pytest.approx(0.009)
    assert values["cifarx_request_seconds_bucket", "/v1/predict", "0.0025"] == 0
    assert values["cifarx_request_seconds_bucket", "/v1/predict", "0.004"] == 3


def test_batches_are_counted_by_model() -> None:
    metrics = Metrics()
    observe, observe_other = metrics.batch_observer("lzh_9"), metrics.batch_observer("other")
    observe(BatchEvent(3, 5, (0.001, 0.002), 0.01, 0, []))
    observe(BatchEvent(64, 2, (0.5,), 0.02, 1, []))
    observe_other(BatchEvent(1, 0, (0.0,), 0.03, 0, []))
    values = parse(metrics.render())
    assert values["cifarx_batch_images_count", "lzh_9"] == 2
    assert values["cifarx_batch_images_sum", "lzh_9"] == 67
    assert values["cifarx_batch_images_bucket", "lzh_9", "4.0"] == 1
    assert values["cifarx_queue_seconds_count", "lzh_9"] == 3
    assert values["cifarx_queue_seconds_sum", "lzh_9"] == pytest.approx(0.503)
    assert values["cifarx_compute_seconds_sum", "lzh_9"] == pytest.approx(0.03)
    assert values["cifarx_queue_images", "lzh_9"] == 2
    assert values["cifarx_batch_images_sum", "other"] == 1


def test_servers_in_one_process_have_separate_metrics() -> None:
    Metrics().observe_request("/v1/predict", 200, 1.0, None)
    assert ("cifarx_requests_total", "/v1/predict", "200") not in parse(Metrics().render())


def test_the_page_is_in_prometheus_text_format() -> None:
    page = Metrics().render().decode()
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")
    for name in ("requests_total counter", "request_seconds histogram", "queue_images gauge", "errors_total counter"):
        assert f"# TYPE cifarx_{name}" in page


_WORKER = """
import asyncio, sys
from cifarx_serve.server.inference.batcher import BatchEvent
from cifarx_serve.server.inference.metrics import Metrics
metrics = Metrics(int(sys.argv[1]))
observe = metrics.batch_observer("lzh_9")

async def count():
    for line in sys.stdin:
        if line == "page\\n":
            page = metrics.render()
            print(len(page), flush=True)
            sys.stdout.buffer.write(page)
            sys.stdout.flush()
        else:
            metrics.observe_request("/v1/predict", 200, 0.003, None)
            observe(BatchEvent(int(line), int(line), (0.001,), 0.01, 0, []))
            metrics.flush()
            print("counted", flush=True)

asyncio.run(count())
"""


class Worker:
    """A process that counts requests and batches."""

    def __init__(self, directory: Path, number: int) -> None:
        command = [sys.executable, "-W", "error", "-c", _WORKER, str(number)]
        environment = os.environ | {PROMETHEUS_MULTIPROC_DIR: str(directory)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout

    def count(self, images: int) -> None:
        self._in.write(b"%d\n" % images)
        self._in.flush()
        assert self._out.readline() == b"counted\n"

    def metrics(self) -> dict[tuple[str, ...], float]:
        self._in.write(b"page\n")
        self._in.flush()
        return parse(self._out.read(int(self._out.readline())))

    def end(self) -> None:
        self._in.close()
        self._out.close()
        assert self.process.wait(20) == 0


def test_every_process_shows_the_metrics_of_all_processes(tmp_path: Path) -> None:
    """Including processes that have ended, except for the images in their queues."""
    first, second = Worker(tmp_path, 0), Worker(tmp_path, 1)
    first.count(3)
    second.count(5)
    second.count(7)
    for worker in (first, second):
        values = worker.metrics()
        assert values["cifarx_requests_total", "/v1/predict", "200"] == 3
        assert values["cifarx_batch_images_sum", "lzh_9"] == 15
        assert values["cifarx_request_seconds_bucket", "/v1/predict", "0.004"] == 3
        assert values["cifarx_queue_images", "lzh_9"] == 10
    second.end()
    third = Worker(tmp_path, 1)
    third.count(1)
    values = third.metrics()
    assert values["cifarx_requests_total", "/v1/predict", "200"] == 4
    assert values["cifarx_batch_images_sum", "lzh_9"] == 16
    first.end()
    third.end()
