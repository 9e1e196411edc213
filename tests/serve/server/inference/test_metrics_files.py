import mmap
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from cifarx_serve.errors import OutputError
from cifarx_serve.server.inference.metrics_files import clear_gauges, create_metrics_files

KEY = mmap_key("queued", "queued", ["model"], ["lzh"], "Queued.")


def read(directory: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return {sample.name: sample.value for family in registry.collect() for sample in family.samples}


@pytest.mark.skipif(sys.platform == "win32", reason="os.stat has no blocks")
def test_the_files_have_all_of_their_space(tmp_path: Path) -> None:
    """A page without space on the disk would kill the process that writes to it."""
    create_metrics_files(tmp_path, 3)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["counter_3.db", "gauge_livesum_3.db", "histogram_3.db"]
    for path in paths:
        status = path.stat()
        assert status.st_size >= mmap.PAGESIZE
        assert status.st_blocks * 512 >= status.st_size


def test_the_library_counts_in_the_files(tmp_path: Path) -> None:
    create_metrics_files(tmp_path, 0)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    for worker_generation in range(2):
        counters = MmapedDict(str(tmp_path / "counter_0.db"))
        value, _ = counters.read_value(KEY)
        assert value == worker_generation, "a worker goes on where the last one stopped"
        counters.write_value(KEY, value + 1, 0.0)
        counters.close()
    assert read(tmp_path) == {"queued": 2.0}
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == sizes


def test_gauges_are_cleared(tmp_path: Path) -> None:
    for worker, queued in ((0, 5.0), (1, 7.0)):
        create_metrics_files(tmp_path, worker)
        gauges = MmapedDict(str(tmp_path / f"gauge_livesum_{worker}.db"))
        gauges.write_value(KEY, queued, 0.0)
        gauges.close()
    assert read(tmp_path) == {"queued": 12.0}
    clear_gauges(tmp_path, 0)
    assert read(tmp_path) == {"queued": 7.0}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_no_space_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "histogram_1.db").symlink_to("/dev/full")
    message = (
        rf"^the metrics of worker 1 cannot be written to {tmp_path} \(No space left on device\): "
        r"free some space, or set TMPDIR to another directory$"
    )
    with pytest.raises(OutputError, match=message):
        create_metrics_files(tmp_path, 1)
