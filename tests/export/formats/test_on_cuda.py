"""Each format that supports CUDA runs there, on a simulated GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from torch import nn

from cifarx_export.formats.registry import FORMATS, NO_OPTIONS, ConversionSource
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.progress import silent
from cifarx_serve.spec import Precision
from tests.support.int8_networks import SPEC, color_blobs, residual_network, vision_transformer
from tests.support.simulated_gpu.counters import changes, counters
from tests.support.simulated_gpu.process import SimulatedGpuProcess

_FORMATS: Final = [
    (name, precision)
    for name, row in FORMATS.items()
    for precision in row.precisions
    if "cuda" in row.devices and (row.directory_suffix is None or precision == "fp32")
]
"""The formats and precisions to test. A directory holds the file of another format."""


def _run_on_second_gpu(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return what the model changed on the first GPU, and what a repeated run changed on the second one."""
    before = counters(0)
    batch = np.zeros((4, 3, 32, 32), np.float32)
    with open_backend(path, device="cuda:1") as backend:
        for _ in range(4):  # TorchScript compiles in the first runs
            assert backend.run(batch).shape == (4, 10)
        repeated = counters(1)
        backend.run(batch)
        return changes(before, 0), changes(repeated, 1)


@pytest.mark.slow
@pytest.mark.parametrize("build", [residual_network, vision_transformer])
@pytest.mark.parametrize(("name", "precision"), _FORMATS)
def test_a_run_waits_only_for_its_copies_and_uses_only_its_gpu(
    tmp_path: Path,
    gpu_process: SimulatedGpuProcess,
    build: Callable[[], nn.Module],
    name: str,
    precision: Precision,
) -> None:
    path = tmp_path / FORMATS[name].file_name("model", precision)
    source = ConversionSource(
        build, msgspec.structs.replace(SPEC, precision=precision), NO_OPTIONS, color_blobs, silent
    )
    artifact = next(iter(FORMATS[name].convert(source)))
    artifact.save(path, artifact.complete_spec(source.spec))
    first, second = gpu_process.call(_run_on_second_gpu, path)
    assert not first
    assert second["copies_to_device"] == second["copies_to_host"] == 1
    assert second.get("stream_synchronizations", 0) <= 2
    waits = {"device_synchronizations", "event_synchronizations", "queries"}
    setup = {"allocations", "host_allocations", "captures", "handles_created", "streams_created"}
    assert not (waits | setup) & set(second)
