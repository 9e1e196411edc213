"""The system's loader and ONNX Runtime are made to say what they say on other machines."""

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
def _nothing_remembered() -> Iterator[None]:
    """What this machine has is found out once a process, and each test is a machine of its own."""
    for found in (cuda_libraries.has_driver, cuda_libraries.preload):
        found.cache_clear()
    yield
    for found in (cuda_libraries.has_driver, cuda_libraries.preload):
        found.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(lacks={...})` has every library but those whose names contain a key, refused with its value."""

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
    assert cuda_libraries.missing() is None


def test_a_cpu_build(machine: Machine) -> None:
    machine(lacks={}, providers=())
    error = cuda_libraries.missing()
    assert isinstance(error, DeviceError)
    assert "CPU build" in error.problem
    assert "onnxruntime-gpu" in error.remedy


def test_no_driver(machine: Machine) -> None:
    machine(lacks={DRIVER: "cannot open shared object file"})
    assert not cuda_libraries.has_driver()
    error = cuda_libraries.missing()
    assert isinstance(error, DeviceError)
    assert f"no NVIDIA driver here ({DRIVER} does not load)" in error.problem
    assert error.remedy == "use --device cpu"


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this ONNX Runtime is a CPU build"
)
def test_a_library_that_does_not_load_is_named(machine: Machine) -> None:
    reason = "libcurand.so.10: cannot open shared object file: No such file or directory"
    machine(lacks={"providers_cuda": reason})
    assert cuda_libraries.has_driver()
    error = cuda_libraries.missing()
    assert isinstance(error, DeviceError)
    assert reason in error.problem
    assert error.remedy == 'pip install "cifarx[cuda]"'
    assert "\n" not in str(error)


def test_preloading_prints_nothing(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    machine(lacks={})
    cuda_libraries.preload()
    assert capfd.readouterr() == ("", "")


def test_this_machine() -> None:
    """Whatever it has: an answer, not an exception, and no answer but a `DeviceError` where there is no driver."""
    if cuda_libraries.has_driver():
        pytest.skip("there is an NVIDIA driver here, and loading its libraries takes seconds")
    assert isinstance(cuda_libraries.missing(), DeviceError)


def test_asking_needs_no_pytorch(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from cifarx_serve.backends import cuda_libraries; cuda_libraries.missing()\n"
        "print('torch' in sys.modules)"
    )
    assert fresh_python(code) == "False"
