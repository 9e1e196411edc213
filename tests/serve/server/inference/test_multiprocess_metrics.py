"""Metrics that one process writes to a directory, as another process reads them."""

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

_PROGRAM = """
import asyncio, sys
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from cifarx_serve.server.inference.multiprocess_metrics import BufferedValues
buffered = BufferedValues(0)
values.ValueClass = buffered.value_class
registry = CollectorRegistry()
images = Counter("images", "Images.", ["model"], registry=registry)
seconds = Histogram("seconds", "Seconds.", registry=registry, buckets=(1, 2))
queued = Gauge("queued", "Queued.", registry=registry, multiprocess_mode="livesum")

async def count():
    for line in sys.stdin:
        if line == "flush\\n":
            buffered.flush()
        elif line == "wait\\n":
            await asyncio.sleep(0.3)
        else:
            images.labels("lzh").inc(float(line))
            seconds.observe(float(line))
            queued.set(float(line))
        print("done", flush=True)

asyncio.run(count())
"""


class CountingProcess:
    """A process that counts the numbers it is sent."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PROMETHEUS_MULTIPROC_DIR": str(directory)},
        )

    def send(self, *lines: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for line in lines:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n"


def read_metrics(directory: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return {
        sample.name + sample.labels.get("le", ""): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


@pytest.fixture
def counting(tmp_path: Path) -> CountingProcess:
    return CountingProcess(tmp_path)


def test_increments_are_visible_after_a_flush(tmp_path: Path, counting: CountingProcess) -> None:
    with counting.process:
        counting.send("0.5", "1.5", "1.5")
        before = read_metrics(tmp_path)
        assert (before.get("images_total", 0), before["seconds_sum"]) == (0, 0)
        counting.send("flush")
        values = read_metrics(tmp_path)
        assert (values["images_total"], values["seconds_sum"]) == (3.5, 3.5)
        assert [values[f"seconds_bucket{bound}"] for bound in ("1.0", "2.0", "+Inf")] == [1, 3, 3]
        counting.send("flush", "4", "flush", "flush")
        values = read_metrics(tmp_path)
        assert (values["images_total"], values["seconds_count"]) == (7.5, 4)


def test_a_gauge_that_is_set_is_visible_at_once(tmp_path: Path, counting: CountingProcess) -> None:
    """Only increments are buffered."""
    with counting.process:
        counting.send("3", "2")
        assert read_metrics(tmp_path)["queued"] == 2


def test_increments_are_flushed_periodically(tmp_path: Path, counting: CountingProcess) -> None:
    with counting.process:
        for total in (2, 4):
            counting.send("2", "wait")
            assert read_metrics(tmp_path)["images_total"] == total
