"""A benchmark row and reports of such rows, with figures that are easy to tell apart."""

from typing import Any

import msgspec

from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow
from cifarx_serve.system.environment import Environment

ENVIRONMENT = Environment("Linux", "3.11", "A CPU", 4, 2, (), {"numpy": "2.4"}, 3000)

ROW = BenchmarkRow(
    file="a.onnx",
    backend="onnxruntime",
    provider="CPUExecutionProvider",
    precision="fp32",
    batch=1,
    p50_us=100,
    p90_us=120,
    p99_us=190,
    percentiles_us=tuple(float(value) for value in range(50, 151)),
    samples=1234,
    images_per_s=9500,
    stable=True,
    spread=0.02,
    agreement=1,
    accuracy=0.75,
    load_ms=40,
    first_call_ms=0.4,
    size_bytes=640_000,
    peak_bytes=85_000_000,
)


def row(**changes: Any) -> BenchmarkRow:
    """Return `ROW` with some fields changed."""
    return msgspec.structs.replace(ROW, **changes)


def report(*rows: BenchmarkRow, **changes: Any) -> BenchmarkReport:
    """Return a report of the rows, or of `ROW` alone; `changes` apply to its environment."""
    return BenchmarkReport(msgspec.structs.replace(ENVIRONMENT, **changes), "drawings", 2000, rows or (ROW,))
