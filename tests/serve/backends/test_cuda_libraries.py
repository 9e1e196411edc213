"""These tests simulate the loader and ONNX Runtime of other machines."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any

import onnxruntime
import pytest

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.errors import DeviceError

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

Machine = Callable[..., None]


@pytest.fixture(autouse=True)
def _empty_caches() -> Iterator[None]:
    """Clear what was cached about this machine, because each test simulates another one."""
    for found in (cuda_libraries.has_driver, cuda_libraries.preload):
        found.cache_clear()
    yield
    for found in (cuda_libraries.has_driver, cuda_libraries.preload):
        found.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Simulate a machine without some libraries: `lacks` maps a part of their names to the message of the loader."""

    def make(lacks: dict[str, str], providers: tuple[str, ...] = ("CUDAExecutionProvider",)) -> None:
        def load(name: str, *_: Any, **__: Any) -> None:
            for part, reason in lacks.items():
                if part in name:
                    raise OSError(reason)

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcurand.so.10"))  # noqa: T201

    return make


def test_nothing_is_missing(machine: Machine) -> None:
    machine(lacks={})
    assert cuda_libraries.has_driver()
    assert cuda_libraries.availability_error() is None


def test_a_cpu_build(machine: Machine) -> None:
    machine(lacks={}, providers=())
    error = cuda_libraries.availability_error()
    assert isinstance(error, DeviceError)
    assert "CPU build" in error.problem
    assert "onnxruntime-gpu" in error.remedy


def test_no_driver(machine: Machine) -> None:
    machine(lacks={DRIVER: "cannot open shared object file"})
    assert not cuda_libraries.has_driver()
    error = cuda_libraries.availability_error()
    assert isinstance(error, DeviceError)
    assert f"no NVIDIA driver found ({DRIVER} does not load)" in error.problem
    assert error.remedy == "use --device cpu"


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="the installed ONNX Runtime is a CPU build",
)
@pytest.mark.parametrize(
    ("library", "cuda", "command"),
    [
        ("libcurand.so.10", "13", 'pip install nvidia-curand, or all CUDA libraries: pip install "cifarx[cuda]"'),
        (
            "libcublasLt.so.12",
            "12",
            'pip install nvidia-cublas-cu12, or all CUDA libraries: pip install "cifarx[cuda]"',
        ),
        ("libcudnn.so.9", "13", 'pip install nvidia-cudnn-cu13, or all CUDA libraries: pip install "cifarx[cuda]"'),
        ("libother.so.1", "13", 'pip install "cifarx[cuda]"'),
    ],
)
def test_a_library_that_does_not_load_is_reported_with_its_package(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, library: str, cuda: str, command: str
) -> None:
    reason = f"{library}: cannot open shared object file: No such file or directory"
    machine(lacks={"providers_cuda": reason})
    monkeypatch.setattr(cuda_libraries, "cuda_major_version", lambda: cuda)
    assert cuda_libraries.has_driver()
    error = cuda_libraries.availability_error()
    assert isinstance(error, DeviceError)
    assert reason in error.problem
    assert error.remedy == command
    assert "\n" not in str(error)


def test_preloading_prints_nothing(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    machine(lacks={})
    cuda_libraries.preload()
    assert capfd.readouterr() == ("", "")


def test_on_this_machine() -> None:
    """Without a driver, the result is a DeviceError."""
    if cuda_libraries.has_driver():
        pytest.skip("an NVIDIA driver is installed, and loading its libraries takes seconds")
    assert isinstance(cuda_libraries.availability_error(), DeviceError)


def test_pytorch_is_not_imported(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from cifarx_serve.backends import cuda_libraries; cuda_libraries.availability_error()\n"
        "print('torch' in sys.modules)"
    )
    assert fresh_python(code) == "False"
