"""These tests simulate the loader and ONNX Runtime of other machines."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.onnxruntime import tensorrt_libraries
from cifarx_serve.errors import DeviceError

Machine = Callable[..., None]
BOTH = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


@pytest.fixture(autouse=True)
def _empty_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear what was cached about this machine, because each test simulates another one."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # restored after the test
    monkeypatch.setitem(sys.modules, "tensorrt_libs", None)
    cached = (cuda_libraries.has_driver, cuda_libraries.preload, tensorrt_libraries.preload)
    for found in cached:
        found.cache_clear()
    yield
    for found in cached:
        found.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Simulate a machine without some libraries: `lacks` maps a part of their names to the message of the loader."""

    def make(lacks: dict[str, str], providers: tuple[str, ...] = BOTH) -> None:
        def load(name: str, *_: Any, **__: Any) -> Any:
            for part, reason in lacks.items():
                if part in name:
                    raise OSError(reason)
            return SimpleNamespace(getInferLibVersion=lambda: 101601)

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
        monkeypatch.setattr(cuda_libraries, "cuda_major_version", lambda: "13")

    return make


needs_provider = pytest.mark.skipif(
    "TensorrtExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="the installed ONNX Runtime is built without TensorRT",
)


def test_nothing_is_missing(machine: Machine) -> None:
    machine(lacks={})
    assert tensorrt_libraries.availability_error() is None
    assert tensorrt_libraries.version() == 101601


def test_a_build_without_tensorrt(machine: Machine) -> None:
    machine(lacks={}, providers=("CUDAExecutionProvider",))
    error = tensorrt_libraries.availability_error()
    assert isinstance(error, DeviceError)
    assert "without TensorRT" in error.problem


def test_missing_cuda_libraries_are_reported_first(machine: Machine) -> None:
    machine(lacks={"cuda.so.1": "no driver", "nvcuda": "no driver", "providers_tensorrt": "libnvinfer.so.10: nowhere"})
    assert "no NVIDIA driver" in str(tensorrt_libraries.availability_error())


@needs_provider
@pytest.mark.parametrize("library", ["libnvinfer.so.10", "libnvonnxparser.so.10", "libnvinfer_plugin.so.11"])
def test_a_missing_library_is_reported_with_the_package_of_its_version(machine: Machine, library: str) -> None:
    reason = f"{library}: cannot open shared object file: No such file or directory"
    machine(lacks={"providers_tensorrt": reason, "nvinfer": reason})
    error = tensorrt_libraries.availability_error()
    assert isinstance(error, DeviceError)
    assert reason in error.problem
    assert error.remedy == f'pip install "tensorrt-cu13-libs=={library[-2:]}.*"'
    assert "\n" not in str(error)
    assert tensorrt_libraries.version() is None


def test_preloading_disables_tf32(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(lacks={})
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setitem(sys.modules, "tensorrt_libs", SimpleNamespace())
    tensorrt_libraries.preload()
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_pytorch_is_not_imported(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from cifarx_serve.backends.onnxruntime.tensorrt_libraries import availability_error\n"
        "availability_error()\n"
        "print('torch' in sys.modules)"
    )
    assert fresh_python(code) == "False"
