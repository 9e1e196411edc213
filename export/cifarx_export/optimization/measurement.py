"""The speed of a candidate: measured in turns with the baseline, so that changes in the machine's speed cancel out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cifarx_export.optimization.results import Latency, Measurement
from cifarx_serve.benchmarking.benchmark import BenchmarkRow, benchmark
from cifarx_serve.progress import Progress
from cifarx_serve.system.cpus import available_cpus

_BATCHES: Final = (8, 64)
"""Batch sizes for the throughput, beside 1."""

_LONGEST_CALL_S: Final = 0.5
"""Batches that would take the baseline longer than this are not measured: they would take most of the search."""

_IMAGES: Final = 64


def measure(
    path: Path, baseline: Path, baseline_p50_us: float | None, images: NDArray[np.uint8], progress: Progress
) -> Measurement:
    """Measure an artifact and the baseline in turns, in processes of their own.

    Args:
        path: the artifact.
        baseline: the file that its speed is relative to; it may be the same file.
        baseline_p50_us: the latency of the baseline at batch 1, if it was measured before.
        images: uint8 (N, height, width, channels).
        progress: called with a line of text at each step.

    Raises:
        CifarxError: a file cannot be run.
    """
    files = list(dict.fromkeys((baseline, path)))
    sample = images[:_IMAGES]
    batches = [1, *_affordable(baseline_p50_us)]
    rows = list(benchmark(files, sample, "", batches, "cpu", progress=progress).rows)
    if baseline_p50_us is None and (larger := _affordable(rows[0].p50_us)):
        rows += benchmark(files, sample, "", larger, "cpu", progress=progress).rows
    of_baseline, own = rows[:: len(files)], rows[len(files) - 1 :: len(files)]
    best, reference = _fastest(own), _fastest(of_baseline)
    return Measurement(
        provider=own[0].provider,
        threads=available_cpus(),
        latency=_latency(own[0], of_baseline[0]),
        one_thread=_measure_one_thread(files, sample, progress) if available_cpus() > 1 else None,
        images_per_s=best.images_per_s,
        batch=best.batch,
        throughput_gain=best.images_per_s / reference.images_per_s,
        load_ms=own[0].load_ms,
        first_call_ms=own[0].first_call_ms,
        peak_bytes=own[0].peak_bytes,
    )


def _affordable(p50_us: float | None) -> list[int]:
    return [] if p50_us is None else [batch for batch in _BATCHES if batch * p50_us <= _LONGEST_CALL_S * 1e6]


def _measure_one_thread(files: Sequence[Path], images: NDArray[np.uint8], progress: Progress) -> Latency:
    rows = benchmark(files, images, "", (1,), "cpu", progress=progress, single_threaded=True).rows
    return _latency(rows[-1], rows[0])


def _latency(own: BenchmarkRow, baseline: BenchmarkRow) -> Latency:
    return Latency(own.p50_us, own.p99_us, baseline.p50_us / own.p50_us, own.stable and baseline.stable)


def _fastest(rows: Sequence[BenchmarkRow]) -> BenchmarkRow:
    return max(rows, key=lambda row: row.images_per_s)
