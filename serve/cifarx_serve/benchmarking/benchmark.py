"""Model files side by side: latency, throughput, and whether they agree."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.benchmarking.process import BenchmarkProcess
from cifarx_serve.benchmarking.timing import Latency, measure_in_turns
from cifarx_serve.errors import UsageError
from cifarx_serve.progress import Progress, silent
from cifarx_serve.system.environment import Environment, environment


class BenchmarkRow(msgspec.Struct, frozen=True):
    """One file at one batch size.

    The time is of one call: a batch in host memory in, logits in host memory out.

    Attributes:
        file: its name; its path where two have one name.
        percentiles_us: from the 0th to the 100th, of `samples` calls.
        images_per_s: images by the time of all counted calls.
        spread: by how much the medians of the last three windows differ, as a share; `stable` up to 10 %.
        agreement: the share of the images whose argmax is that of the first file.
        accuracy: the share whose argmax is the label; None where there are no labels.
        load_ms: to open the file, its library's import among it, in a new process.
        first_call_ms: of the first call, with one image.
        peak_bytes: the most memory that the file's process held, whatever the batch size.
        device_us: median of the time between two events on the device around the run alone, the input already there;
            the wall time has the copies. None where there is no such device, as on a CPU.
    """

    file: str
    backend: str
    provider: str
    precision: str
    batch: int
    p50_us: float
    p90_us: float
    p99_us: float
    percentiles_us: tuple[float, ...]
    samples: int
    images_per_s: float
    stable: bool
    spread: float
    agreement: float
    accuracy: float | None
    load_ms: float
    first_call_ms: float
    size_bytes: int
    peak_bytes: int
    device_us: float | None = None


class BenchmarkReport(msgspec.Struct, frozen=True):
    """Rows by batch size, then by file; `data` and `images` say what agreement and accuracy were measured on."""

    environment: Environment
    data: str
    images: int
    rows: tuple[BenchmarkRow, ...]


class _File(NamedTuple):
    """One file's process, and what does not depend on the batch size."""

    name: str
    process: BenchmarkProcess
    agreement: float
    accuracy: float | None
    peak_bytes: int


def benchmark(
    files: Sequence[Path],
    images: NDArray[np.uint8],
    data_name: str,
    batches: Sequence[int] = (1, 64),
    device: str = "auto",
    seconds: float = 1.0,
    labels: NDArray[np.int64] | None = None,
    progress: Progress = silent,
) -> BenchmarkReport:
    """Open each file in a process of its own, measure them in turns, and compare their answers on all images.

    Args:
        files: model files of any backends, all for the same input; the first is the one to agree with.
        images: uint8 (N, height, width, 3) at the models' input size.
        data_name: what the images are, for the report.
        batches: batch sizes.
        device: auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N or mps, for every file.
        seconds: of measuring, a file and batch size; up to three times as long where a file is not steady.
        labels: the images' classes, (N,), for the accuracy.
        progress: told what is being done.

    Raises:
        UsageError: no file, a batch size below 1 or above the number of images, or models of different inputs.
        ModelFileError, DeviceError: a file cannot be run on the device.
    """
    if not files:
        raise UsageError("no file to measure", "name at least one model file")
    if bad := [batch for batch in batches if not 1 <= batch <= len(images)]:
        raise UsageError(f"batch size {bad[0]}", f"give 1 to {len(images)}, the number of images")
    with tempfile.TemporaryDirectory(prefix="cifarx-bench-") as folder, ExitStack() as stack:
        stored = Path(folder) / "images.npy"
        np.save(stored, images)
        processes = [stack.enter_context(closing(_open(path, device, stored, progress))) for path in files]
        latencies = {batch: _measure(processes, batch, seconds, progress) for batch in batches}
        measured = _compare(processes, labels, progress)
        rows = [
            _row(file, batch, latency, _device_us(file.process, batch))
            for batch, found in latencies.items()
            for file, latency in zip(measured, found, strict=True)
        ]
        return BenchmarkReport(environment(), data_name, len(images), tuple(rows))


def _open(path: Path, device: str, images: Path, progress: Progress) -> BenchmarkProcess:
    progress(f"opening {path}")
    return BenchmarkProcess(path, device, images)


def _measure(processes: Sequence[BenchmarkProcess], batch: int, seconds: float, progress: Progress) -> list[Latency]:
    progress(f"measuring {len(processes)} files at batch {batch}")
    for process in processes:
        process.warm_up(batch)
    return measure_in_turns([process.window for process in processes], seconds)


def _compare(
    processes: Sequence[BenchmarkProcess], labels: NDArray[np.int64] | None, progress: Progress
) -> list[_File]:
    names = [process.path.name for process in processes]
    files: list[_File] = []
    expected: NDArray[np.int64] | None = None
    for process in processes:
        progress(f"classifying every image by {process.path}")
        peak = process.peak()  # before: the images are the benchmark's, not the model's
        answers = process.classify()
        expected = answers if expected is None else expected
        accuracy = None if labels is None else float((answers == labels).mean())
        name = process.path.name if names.count(process.path.name) == 1 else str(process.path)
        files.append(_File(name, process, float((answers == expected).mean()), accuracy, peak))
    return files


def _device_us(process: BenchmarkProcess, batch: int) -> float | None:
    """Asked for last: a second session may be opened for it, which no other figure must hold."""
    times = process.device_times(batch)
    return round(float(np.median(times)), 3) if len(times) else None


def _row(file: _File, batch: int, latency: Latency, device_us: float | None) -> BenchmarkRow:
    opened = file.process.opened
    return BenchmarkRow(
        file=file.name,
        backend=opened.backend,
        provider=opened.provider,
        precision=opened.precision,
        batch=batch,
        p50_us=latency.p50_us,
        p90_us=latency.p90_us,
        p99_us=latency.p99_us,
        percentiles_us=latency.percentiles,
        samples=latency.samples,
        images_per_s=batch / latency.mean_us * 1e6,
        stable=latency.stable,
        spread=latency.spread,
        agreement=file.agreement,
        accuracy=file.accuracy,
        load_ms=opened.load_ms,
        first_call_ms=opened.first_call_ms,
        size_bytes=opened.size_bytes,
        peak_bytes=file.peak_bytes,
        device_us=device_us,
    )
