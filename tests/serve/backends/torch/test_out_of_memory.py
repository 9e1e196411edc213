from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.backends.torch.out_of_memory import report_out_of_memory
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceMemoryError, ModelFileError
from cifarx_serve.spec import ModelSpec

CPU = torch.device("cpu")
CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 1.12 GiB. GPU 0 has a total capacity of 1000.00 MiB of which 618.00 MiB is "
    "free. Of the allocated memory 382.00 MiB is allocated by PyTorch, and 0 bytes is reserved."
)
MPS_MESSAGE = (
    "MPS backend out of memory (MPS allocated: 5.05 GiB, other allocations: 1.90 GiB, max allowed: 6.80 GiB). "
    "Tried to allocate 20.25 MiB on private pool."
)


class Allocating(nn.Module):
    """Fails with an error, or allocates more memory than any machine has."""

    def __init__(self, error: RuntimeError | None = None) -> None:
        super().__init__()
        self.error = error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.error:
            raise self.error
        return images.new_empty(10**14)


class ModuleBackend(TorchBackend):
    """Runs a module on the CPU."""

    name = "module"

    def __init__(self, module: Any) -> None:
        self._init_module(module, CPU)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        raise NotImplementedError


def run(module: nn.Module, count: int = 8) -> None:
    ModuleBackend(module).run(np.zeros((count, 3, 4, 4), np.float32))


def test_a_real_failed_allocation_names_the_size_and_a_smaller_batch() -> None:
    with pytest.raises(DeviceMemoryError) as caught:
        run(Allocating())
    assert caught.value.problem == "cpu is out of memory (372529.03 GiB requested) with a batch of 8 images"
    assert caught.value.remedy == "use a smaller batch size"


@pytest.mark.parametrize(
    ("error", "sizes"),
    [
        (torch.OutOfMemoryError(CUDA_MESSAGE), " (1.12 GiB requested, 618.0 MiB free)"),
        (RuntimeError(MPS_MESSAGE), " (20.2 MiB requested)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (RuntimeError(f"The following operation failed in the TorchScript interpreter.\n{CUDA_MESSAGE}"), " (1.12 GiB"),
        (torch.OutOfMemoryError("no memory left"), ""),
    ],
)
def test_the_errors_of_every_device_are_recognized(error: RuntimeError, sizes: str) -> None:
    with pytest.raises(DeviceMemoryError) as caught:
        run(Allocating(error))
    assert caught.value.problem.startswith(f"cpu is out of memory{sizes}")
    assert "with a batch of 8 images" in caught.value.problem
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("batch_size", "remedy"),
    [
        (None, "end other programs that use its memory, or use another --device"),
        (1, "use another --device"),
        (2000, "use a smaller batch size"),
    ],
)
def test_the_remedy_depends_on_the_batch(batch_size: int | None, remedy: str) -> None:
    with pytest.raises(DeviceMemoryError) as caught, report_out_of_memory(torch.device("cuda", 1), batch_size):
        raise torch.OutOfMemoryError(CUDA_MESSAGE)
    assert caught.value.problem.startswith("cuda:1 is out of memory (1.12 GiB requested, 618.0 MiB free)")
    assert caught.value.remedy == remedy


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")])
def test_other_errors_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, report_out_of_memory(CPU):
        raise error
    assert caught.value is error


def test_a_file_that_does_not_fit_is_not_reported_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarx_serve.backends.torch.exported_program import ExportedProgramBackend
    from cifarx_serve.backends.torch.torchscript import TorchScriptBackend
    from tests.support.color_model import write_torchscript

    path = write_torchscript(tmp_path / "colors.torchscript.pt")

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    monkeypatch.setattr(torch.jit, "load", fail)
    with pytest.raises(DeviceMemoryError, match="cpu is out of memory"):
        TorchScriptBackend(path, Device("cpu"))
    monkeypatch.setattr(torch.export, "load", fail)
    monkeypatch.setattr("cifarx_serve.backends.torch.exported_program_archive.checked_archive", lambda path: path)
    monkeypatch.setattr("cifarx_serve.backends.torch.exported_program_archive.read_spec", lambda _: None)
    with pytest.raises(DeviceMemoryError, match="cpu is out of memory"):
        ExportedProgramBackend(path, Device("cpu"))
    assert not issubclass(DeviceMemoryError, ModelFileError)
