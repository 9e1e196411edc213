"""Results of a search as a test needs them."""

from typing import Any

from cifarx_export.optimization.results import CandidateResult, Latency, Measurement, OptimizationReport
from cifarx_serve.system.environment import Environment


def measurement(speedup: float = 1.0, **changes: Any) -> Measurement:
    """Return a measurement against a baseline of 1 ms."""
    latency = Latency(1000 / speedup, 1500 / speedup, speedup, True)
    fields: dict[str, Any] = {
        "provider": "a runtime",
        "threads": 2,
        "latency": latency,
        "one_thread": Latency(2000 / speedup, 2500 / speedup, speedup, True),
        "images_per_s": 4000 * speedup,
        "batch": 64,
        "throughput_gain": speedup,
        "load_ms": 50.0,
        "first_call_ms": 3.0,
        "peak_bytes": 100_000_000,
    }
    return Measurement(**{**fields, **changes})


def proved(name: str, speedup: float | None = None, **changes: Any) -> CandidateResult:
    """Return the result of a proved candidate, such as `onnx int8`, measured if a speed-up is given."""
    format_, precision = name.split()
    fields: dict[str, Any] = {
        "format": format_,
        "precision": precision,
        "outcome": "proved",
        "file": f"net.{precision}.{format_}",
        "sha256": "0" * 64,
        "size_bytes": 1_000_000,
        "agreement": 1.0,
        "agreement_bound": 0.999,
        "accuracy": 0.75,
        "accuracy_drop": 0.0,
        "measurement": None if speedup is None else measurement(speedup),
    }
    return CandidateResult(**{**fields, **changes})


def left_out(name: str, outcome: Any, reason: str) -> CandidateResult:
    """Return the result of a candidate that was not proved."""
    format_, precision = name.split()
    return CandidateResult(format=format_, precision=precision, outcome=outcome, reason=reason)  # type: ignore[arg-type]


def report(*results: CandidateResult, **changes: Any) -> OptimizationReport:
    """Return the report of a search for the lowest latency."""
    fields: dict[str, Any] = {
        "checkpoint": "net.pth",
        "checkpoint_sha256": "0" * 64,
        "data": "1,000 images of photos",
        "reference_accuracy": 0.75,
        "require": "accuracy_drop<=0.5",
        "prefer": "latency",
        "targets": ("cpu",),
        "baseline": "onnx fp32",
        "results": results,
        "front": (),
        "pick": None,
        "reason": "no candidate meets p99<1us",
        "file": None,
        "study": "net.optimize",
        "stopped": None,
        "seconds": 12.5,
        "environment": Environment("Linux", "3.12", "a CPU", 4, 2, (), {"onnxruntime": "1.31"}),
    }
    return OptimizationReport(**{**fields, **changes})
