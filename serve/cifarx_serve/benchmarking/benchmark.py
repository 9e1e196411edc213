"""Benchmarks model files side by side: latency, throughput, and agreement of their predictions."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import NOTHING_STATED
from cifarx_serve.benchmarking.process import BenchmarkProcess
from cifarx_serve.benchmarking.timing import Latency, measure_interleaved
from cifarx_serve.benchmarking.worker import MemoryUse, Predictions
from cifarx_serve.errors import OutputError, UsageError, error_message
from cifarx_serve.progress import Progress, silent
from cifarx_serve.system.environment import Environment, current_environment
from cifarx_serve.system.terminal import require_utf8

_MAX_REPEATED: Final = 1024
"""The largest batch size for which images are repeated, if there are fewer."""


class BenchmarkRow(msgspec.Struct, frozen=True):
    """The measurements of one file at one batch size.

    Latencies are the wall time of one call, from a batch in host memory to logits in host memory, in microseconds.

    Attributes:
        file: the name of the file, or its path if several files have the same name.
        percentiles_us: the percentiles from the 0th to the 100th, over `samples` calls.
        images_per_s: the throughput: images divided by the total time of all counted calls.
        stable: whether `spread` is at most 10 %.
        spread: the relative difference between the medians of the last three windows.
        agreement: the fraction of images for which the file and the first file predict the same class, or the same set
            of labels.
        accuracy: the fraction of images whose label is the best class; None without labels.
        load_ms: the time to open the file in a new process, including the import of its library.
        first_call_ms: the time of the first call, with one image.
        size_bytes: the size of the file.
        peak_bytes: the peak memory of the process of the file, over all batch sizes.
        device_us: the median time between two events on the device around the run, with the input already there. The
            copies are included only in the wall time. None for a device without events, such as a CPU.
        gpu_bytes: by how much the used memory of the GPUs grew while the file was opened and warmed up at all batch
            sizes, with the CUDA context of its process. Other programs on the GPUs disturb it. None for a file on the
            CPU, or if it cannot be read.
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
    gpu_bytes: int | None = None


class BenchmarkReport(msgspec.Struct, frozen=True):
    """The rows, sorted by batch size and then by file.

    Attributes:
        data: the name of the data that agreement and accuracy were measured on.
        images: the number of images in it.
        multi_label: whether several labels can apply to an image, so that the agreement is that of all labels.
        test_images: the number of images that the accuracy was measured on; the others are training images.
        warnings: what the agreement and the accuracy do not prove.
    """

    environment: Environment
    data: str
    images: int
    rows: tuple[BenchmarkRow, ...]
    multi_label: bool = False
    test_images: int | None = None
    warnings: tuple[str, ...] = ()


class _File(NamedTuple):
    """The process of one file, and its results that do not depend on the batch size."""

    name: str
    process: BenchmarkProcess
    agreement: float
    accuracy: float | None
    memory: MemoryUse


def benchmark(
    files: Sequence[Path],
    images: NDArray[np.uint8],
    data_name: str,
    batch_sizes: Sequence[int] = (1, 64),
    device: str = "auto",
    seconds: float = 1.0,
    labels: NDArray[np.int64] | None = None,
    progress: Progress = silent,
    stated: Mapping[str, Any] = NOTHING_STATED,
    test_images: int | None = None,
    warnings: tuple[str, ...] = (),
    single_threaded: bool = False,
) -> BenchmarkReport:
    """Open each file in its own process, measure the files in turns, and compare their predictions on all images.

    Args:
        files: model files of any backend with the same input size. Agreement is measured against the first one.
        images: uint8 (N, height, width, channels), at the input size of the models.
        data_name: the name of the images, for the report.
        batch_sizes: the batch sizes to measure.
        device: auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N, mps, gpu or npu, for all files.
        seconds: how long to measure each file at each batch size; up to three times as long if a file is unstable.
        labels: int64 (N,), to measure the accuracy.
        progress: called with a line of text for each step.
        stated: what the user states about the checkpoints among the files, see `Backend.open_stated`.
        test_images: the number of the first images that the accuracy is measured on; None for all.
        warnings: what the images do not prove, for the report.
        single_threaded: whether to run each file in one thread, see `Backend.single_threaded`.

    Raises:
        UsageError: there is no file, a batch size is less than 1, or more than 1,024 and the number of images, or the
            models have different input sizes.
        ModelFileError: a file does not exist or cannot be run.
        DeviceError: the device is not available.
        OutputError: there is no space for temporary files.
    """
    if not files:
        raise UsageError("no file to measure", "give at least one model file")
    require_utf8(*files)
    largest = max(len(images), _MAX_REPEATED)
    if invalid := [batch for batch in batch_sizes if not 1 <= batch <= largest]:
        raise UsageError(f"batch size {invalid[0]} is out of range", f"give 1 to {largest}, for {len(images)} images")
    with tempfile.TemporaryDirectory(prefix="cifarx-bench-") as folder, ExitStack() as stack:
        images_file = Path(folder) / "images.npy"
        try:
            np.save(images_file, images)
        except OSError as error:
            problem = f"cannot write the images to {folder} ({error_message(error)})"
            raise OutputError(problem, "free some space, or set TMPDIR to another directory") from error
        processes = []
        for path in files:
            progress(f"opening {path}")
            process = BenchmarkProcess(path, device, images_file, stated, single_threaded=single_threaded)
            processes.append(stack.enter_context(closing(process)))
        latencies = {batch: _measure(processes, batch, seconds, progress) for batch in batch_sizes}
        tested = len(images) if test_images is None else test_images
        compared = _compare(processes, None if labels is None else labels[:tested], progress)
        rows = [
            _row(file, batch, latency, _device_us(file.process, batch))
            for batch, batch_latencies in latencies.items()
            for file, latency in zip(compared, batch_latencies, strict=True)
        ]
        multi_label = any(process.opened.multi_label for process in processes)
        return BenchmarkReport(
            current_environment(), data_name, len(images), tuple(rows), multi_label, tested, warnings
        )


def _measure(processes: Sequence[BenchmarkProcess], batch: int, seconds: float, progress: Progress) -> list[Latency]:
    progress(f"measuring {len(processes)} files at batch {batch}")
    for process in processes:
        process.warm_up(batch)
    return measure_interleaved([process.measure_window for process in processes], seconds)


def _compare(
    processes: Sequence[BenchmarkProcess], labels: NDArray[np.int64] | None, progress: Progress
) -> list[_File]:
    names = [process.path.name for process in processes]
    files: list[_File] = []
    expected: Predictions | None = None
    for process in processes:
        progress(f"classifying all images with {process.path}")
        memory = process.memory_use()  # before all images are in memory, which are not part of the model
        predicted = process.predict()
        expected = predicted if expected is None else expected
        accuracy = None if labels is None else float((np.array(predicted.classes[: len(labels)]) == labels).mean())
        agreement = float(np.mean([one == other for one, other in zip(predicted.labels, expected.labels, strict=True)]))
        name = process.path.name if names.count(process.path.name) == 1 else str(process.path)
        files.append(_File(name, process, agreement, accuracy, memory))
    return files


def _device_us(process: BenchmarkProcess, batch: int) -> float | None:
    """Return the median device time. Measure it last: it can open a second session, which must not affect the rest."""
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
        peak_bytes=file.memory.peak_bytes,
        device_us=device_us,
        gpu_bytes=file.memory.gpu_bytes,
    )
