"""Figures of a process in a folder, as another process reads them."""

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

_COUNTING = """
import asyncio, sys
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from cifarx_serve.server.inference.multiprocess_metrics import SharedFigures
shared = SharedFigures()
values.ValueClass = shared.value_class
own = CollectorRegistry()
images = Counter("images", "Images.", ["model"], registry=own)
seconds = Histogram("seconds", "Seconds.", registry=own, buckets=(1, 2))
waiting = Gauge("waiting", "Waiting.", registry=own, multiprocess_mode="livesum")

async def count():
    for line in sys.stdin:
        if line == "write\\n":
            shared.write()
        elif line == "wait\\n":
            await asyncio.sleep(0.3)
        else:
            images.labels("lzh").inc(float(line))
            seconds.observe(float(line))
            waiting.set(float(line))
        print("done", flush=True)

asyncio.run(count())
"""


class Counting:
    """A process that counts what it is told."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _COUNTING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PROMETHEUS_MULTIPROC_DIR": str(folder)},
        )

    def tell(self, *lines: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for line in lines:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n"


def figures(folder: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return {
        sample.name + sample.labels.get("le", ""): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


@pytest.fixture
def counting(tmp_path: Path) -> Counting:
    return Counting(tmp_path)


def test_what_is_counted_is_seen_once_it_is_written(tmp_path: Path, counting: Counting) -> None:
    with counting.process:
        counting.tell("0.5", "1.5", "1.5")
        before = figures(tmp_path)
        assert (before.get("images_total", 0), before["seconds_sum"]) == (0, 0)
        counting.tell("write")
        found = figures(tmp_path)
        assert (found["images_total"], found["seconds_sum"]) == (3.5, 3.5)
        assert [found[f"seconds_bucket{bound}"] for bound in ("1.0", "2.0", "+Inf")] == [1, 3, 3]
        counting.tell("write", "4", "write", "write")
        found = figures(tmp_path)
        assert (found["images_total"], found["seconds_count"]) == (7.5, 4)


def test_a_state_is_seen_at_once(tmp_path: Path, counting: Counting) -> None:
    """What is set, and not added to, is not held back."""
    with counting.process:
        counting.tell("3", "2")
        assert figures(tmp_path)["waiting"] == 2


def test_it_is_written_soon_in_any_case(tmp_path: Path, counting: Counting) -> None:
    with counting.process:
        for total in (2, 4):
            counting.tell("2", "wait")
            assert figures(tmp_path)["images_total"] == total
