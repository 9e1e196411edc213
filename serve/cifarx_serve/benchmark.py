"""Model files side by side: latency, throughput, and whether they agree."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import model_file, open_backend
from cifarx_serve.environment import Environment, environment
from cifarx_serve.errors import UsageError
from cifarx_serve.measuring import Latency, Runner, measure
from cifarx_serve.preprocess import model_input
from cifarx_serve.progress import Progress, silent


class BenchmarkRow(msgspec.Struct, frozen=True):
    """One file at one batch size.

    The time is of one call: a float32 batch in host memory in, logits in host memory out. `agreement` is the share
    of the images whose argmax is that of the first file; `load_ms` the time to open the file.
    """

    file: str
    backend: str
    provider: str
    precision: str
    batch: int
    p50_us: float
    p90_us: float
    p99_us: float
    samples: int
    images_per_s: float
    agreement: float
    load_ms: float
    size_bytes: int


class BenchmarkReport(msgspec.Struct, frozen=True):
    """Rows by batch size, then by file; `data` and `images` say what agreement was measured on."""

    environment: Environment
    data: str
    images: int
    rows: tuple[BenchmarkRow, ...]


class _Opened(msgspec.Struct, frozen=True):
    path: Path
    backend: Backend
    load_ms: float
    labels: NDArray[np.int64]


def benchmark(
    files: Sequence[Path],
    images: NDArray[np.uint8],
    data_name: str,
    batches: Sequence[int] = (1, 64),
    device: str = "auto",
    seconds: float = 1.0,
    progress: Progress = silent,
) -> BenchmarkReport:
    """Open the files, compare their answers on all images, and measure them in turns.

    Args:
        files: model files of any backends, all for the same input; the first is the one to agree with.
        images: uint8 (N, height, width, 3) at the models' input size.
        data_name: what the images are, for the report.
        batches: batch sizes.
        device: auto, cpu, cuda, cuda:N or mps, for every file.
        seconds: of measuring, a file and batch size.

    Raises:
        UsageError: no file, a batch size below 1 or above the number of images, or models of different inputs.
        ModelFileError, DeviceError: a file cannot be run on the device.
    """
    if not files:
        raise UsageError("no file to measure", "name at least one model file")
    if bad := [batch for batch in batches if not 1 <= batch <= len(images)]:
        raise UsageError(f"batch size {bad[0]}", f"give 1 to {len(images)}, the number of images")
    with ExitStack() as stack:
        opened = [_open(path, device, images, stack, progress) for path in files]
        rows = [row for batch in batches for row in _rows(opened, images, batch, seconds, progress)]
    return BenchmarkReport(environment(), data_name, len(images), tuple(rows))


def predicted_labels(backend: Backend, images: NDArray[np.uint8], batch: int = 64) -> NDArray[np.int64]:
    """The argmax of each image, (N,)."""
    parts = (model_input(images[start : start + batch], backend.spec) for start in range(0, len(images), batch))
    return np.concatenate([backend.run(part).argmax(1) for part in parts])


def _open(path: Path, device: str, images: NDArray[np.uint8], stack: ExitStack, progress: Progress) -> _Opened:
    progress(f"opening {path}")
    started = time.perf_counter()
    backend = stack.enter_context(open_backend(path, device=device))
    load_ms = (time.perf_counter() - started) * 1e3
    size = (backend.spec.input.height, backend.spec.input.width)
    if images.shape[1:3] != size:
        raise UsageError(
            f"{path} takes images of {size[0]}x{size[1]}, the first file {images.shape[1]}x{images.shape[2]}",
            "compare models of one input size",
        )
    return _Opened(path, backend, load_ms, predicted_labels(backend, images))


def _rows(
    opened: Sequence[_Opened],
    images: NDArray[np.uint8],
    batch: int,
    seconds: float,
    progress: Progress,
) -> list[BenchmarkRow]:
    progress(f"measuring {len(opened)} files at batch {batch}")
    latencies = measure([_runner(model.backend, images[:batch]) for model in opened], seconds)
    return [_row(model, opened[0].labels, batch, latency) for model, latency in zip(opened, latencies, strict=True)]


def _runner(backend: Backend, images: NDArray[np.uint8]) -> Runner:
    inputs = model_input(images, backend.spec)
    return Runner(backend.name, lambda: backend.run(inputs))


def _row(model: _Opened, expected: NDArray[np.int64], batch: int, latency: Latency) -> BenchmarkRow:
    return BenchmarkRow(
        file=model.path.name,
        backend=model.backend.name,
        provider=model.backend.provider,
        precision=model.backend.spec.precision,
        batch=batch,
        p50_us=latency.p50_us,
        p90_us=latency.p90_us,
        p99_us=latency.p99_us,
        samples=latency.samples,
        images_per_s=batch / latency.p50_us * 1e6,
        agreement=float((model.labels == expected).mean()),
        load_ms=model.load_ms,
        size_bytes=model_file(model.path).stat().st_size,
    )
