"""Latency and agreement of PyTorch, TorchScript and ONNX Runtime on the same checkpoint.

Rows come from `benchmark`, one backend after the other; the ratios from turns of a tenth of a second, so that they
hold when the machine drifts.
"""

from typing import Any

import numpy as np
import pytest
from measured_models import Models

from cifarx_export.comparison import find_flips
from cifarx_export.gates import GATES
from cifarx_serve.backends.base import Backend
from cifarx_serve.measuring import Runner, measure
from cifarx_serve.preprocess import scale

ROUNDS = {1: 1000, 64: 60}
TURNS_S = 1.0


@pytest.fixture(scope="session", params=list(ROUNDS), ids=lambda batch: f"batch{batch}")
def batch(request: pytest.FixtureRequest) -> int:
    """The batch size."""
    size: int = request.param
    return size


@pytest.fixture(scope="session")
def speedups(backends: dict[str, Backend], batch: int, models: Models) -> dict[str, float]:
    """By how much each backend's median call is shorter than PyTorch's."""
    inputs = scale(models.images[:batch], backends["pytorch"].spec.input)
    runners = [Runner(name, lambda backend=backend: backend.run(inputs)) for name, backend in backends.items()]
    medians = [latency.p50_us for latency in measure(runners, TURNS_S)]
    return {name: medians[0] / median for name, median in zip(backends, medians, strict=True)}


@pytest.mark.parametrize("name", ["pytorch", "torchscript", "onnxruntime"])
def test_latency_and_agreement(
    benchmark: Any,
    name: str,
    backends: dict[str, Backend],
    batch: int,
    models: Models,
    speedups: dict[str, float],
    rows: list[tuple[str, ...]],
) -> None:
    backend, reference = backends[name], backends["pytorch"]
    inputs = scale(models.images[:batch], backend.spec.input)
    benchmark.group = f"{backend.provider} batch {batch}"
    benchmark.pedantic(backend.run, args=(inputs,), rounds=ROUNDS[batch], warmup_rounds=ROUNDS[batch] // 5)

    ours, theirs = (
        np.concatenate([each.run(scale(part, each.spec.input)) for part in np.array_split(models.images, 40)])
        for each in (backend, reference)
    )
    agreement = float((ours.argmax(1) == theirs.argmax(1)).mean())
    benchmark.extra_info.update(agreement=agreement, provider=backend.provider, data=models.data)

    p50, p90, p99 = np.percentile(benchmark.stats.stats.data, (50, 90, 99)) * 1e6
    rows.append(
        (
            name,
            backend.provider,
            str(batch),
            f"{p50:,.0f}",
            f"{p90:,.0f}",
            f"{p99:,.0f}",
            f"{batch / p50 * 1e6:,.0f}",
            f"{speedups[name]:.2f}",
            f"{agreement:.2%}",
        )
    )
    assert find_flips(theirs, ours, GATES["fp32"]).forgiven.all()
