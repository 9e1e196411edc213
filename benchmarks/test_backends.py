"""Latency and argmax agreement of PyTorch, TorchScript and ONNX Runtime on the same checkpoints.

The table holds the figures of `cifarx bench`: one process per file, measured in turns of a tenth of a second. The
figures of pytest-benchmark, which its own files and comparisons use, come from this process.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.support.models import Models, exported, untrained
from benchmarks.support.progress_bar import ProgressBar
from cifarx_export.parity.metrics import find_flips
from cifarx_export.parity.tolerances import TOLERANCES
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, benchmark
from cifarx_serve.errors import DeviceError
from cifarx_serve.images.preprocess import normalize

ROUNDS = {"lzh": {1: 200, 64: 10}, "resnet34": {1: 20, 64: 3}}
BATCHES = (1, 64)
BACKENDS = ("pytorch", "torchscript", "onnxruntime")

COMPARED = 1000
"""Number of images whose logits are compared; of Lzh, agreement is measured on all images."""

SECONDS = 1.0


@dataclass(frozen=True)
class Side:
    """One network on one device: the opened backends and the report of `cifarx bench`."""

    models: Models
    backends: dict[str, Backend]
    report: BenchmarkReport


@pytest.fixture(scope="module")
def resnet34(tmp_path_factory: pytest.TempPathFactory, bar: ProgressBar) -> Models:
    """Return ResNet-34 with its initial weights, exported to every format."""
    folder: Path = tmp_path_factory.mktemp("resnet34")
    with bar.stage("export resnet34", share=0.3, steps=10) as stage:
        return exported(untrained("resnet34", folder / "resnet34_0.pth"), folder, "builtin", stage)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Return the name of a device of this machine."""
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=list(ROUNDS))
def side(request: pytest.FixtureRequest, device: str, bar: ProgressBar) -> Iterator[Side]:
    models: Models = request.getfixturevalue("models" if request.param == "lzh" else request.param)
    with ExitStack() as stack:
        try:
            backends = {name: stack.enter_context(open_backend(models.files[name], device=device)) for name in BACKENDS}
        except DeviceError as error:
            pytest.skip(str(error))
        images = models.images if request.param == "lzh" else models.images[:COMPARED]
        files = [models.files[name] for name in BACKENDS]
        with bar.stage(f"measure {request.param} on {device}", share=0.2, steps=8) as stage:
            report = benchmark(files, images, models.data, BATCHES, device, SECONDS, progress=stage)
        yield Side(models, backends, report)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", BACKENDS)
def test_latency_and_agreement(benchmark: Any, name: str, side: Side, batch: int, rows: list[tuple[str, ...]]) -> None:
    backend, reference = side.backends[name], side.backends["pytorch"]
    inputs = normalize(side.models.images[:batch], backend.spec.input)
    benchmark.group = f"{side.models.network} {backend.provider} batch {batch}"
    benchmark.pedantic(backend.run, args=(inputs,), rounds=ROUNDS[side.models.network][batch], warmup_rounds=3)

    first, row = (
        next(row for row in side.report.rows if (row.backend, row.batch) == (wanted, batch))
        for wanted in ("pytorch", name)
    )
    benchmark.extra_info.update(agreement=row.agreement, provider=row.provider, data=side.report.data)
    rows.append(
        (
            side.models.network,
            name,
            row.provider,
            str(batch),
            f"{'' if row.stable else '~'}{row.p50_us:,.0f}",
            f"{row.p90_us:,.0f}",
            f"{row.p99_us:,.0f}",
            f"{row.images_per_s:,.0f}",
            f"{first.p50_us / row.p50_us:.2f}",
            f"{row.agreement:.2%}",
        )
    )
    images = side.models.images[:COMPARED]
    assert find_flips(_logits(reference, images), _logits(backend, images), TOLERANCES["fp32"]).forgiven.all()


def _logits(backend: Backend, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.concatenate([backend.run(normalize(part, backend.spec.input)) for part in np.array_split(images, 20)])
