import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cifarx_serve.system import gpus
from cifarx_serve.system.environment import current_environment
from tests.support.simulated_gpu.process import SimulatedGpuProcess


@pytest.fixture(autouse=True)
def _no_cached_library() -> Iterator[None]:
    gpus._nvml.cache_clear()
    yield
    gpus._nvml.cache_clear()


def test_the_names_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("NVIDIA L4", "NVIDIA H200")):
        folder = tmp_path / f"0000:0{number}:00.0"
        folder.mkdir()
        (folder / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 24\n")
    monkeypatch.setattr(gpus, "_DRIVER_FOLDER", tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert gpus.gpu_names() == current_environment().gpus == ("NVIDIA L4", "NVIDIA H200")


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpus, "_DRIVER_FOLDER", tmp_path / "none")
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert gpus.gpu_names() == ()
    assert gpus.used_gpu_memory() is None


class _FailingLibrary:
    """A management library without a driver: no function succeeds."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_: 9


def test_a_library_that_cannot_be_initialized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_DRIVER_FOLDER", tmp_path / "none")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: _FailingLibrary())
    assert gpus.gpu_names() == ()
    assert gpus.used_gpu_memory() is None


def _allocate(size: int) -> tuple[tuple[str, ...], int | None, int | None]:
    before = gpus.used_gpu_memory()
    address = ctypes.c_void_p()
    assert ctypes.CDLL(None).cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)) == 0
    return gpus.gpu_names(), before, gpus.used_gpu_memory()


def test_a_sandbox_that_hides_the_list_of_the_driver(gpu_process: SimulatedGpuProcess) -> None:
    names, before, after = gpu_process.call(_allocate, 5 << 20)
    assert names == ("Simulated GPU", "Simulated GPU")
    assert before is not None
    assert after == before + (5 << 20)
