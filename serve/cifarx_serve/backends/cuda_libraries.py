"""What ONNX Runtime needs for CUDA: load it, and say what is missing. Imports no PyTorch."""

import contextlib
import ctypes
import io
import sys
from functools import cache
from pathlib import Path

from cifarx_serve.errors import DeviceError

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_INSTALL = 'pip install "cifarx[cuda]"'


@cache
def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver: without one, no library helps."""
    return _load_problem(_DRIVER) is None


@cache
def preload() -> None:
    """Load the CUDA and cuDNN libraries that pip installed, which the system's loader does not look for."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; `missing` says it in one line
        onnxruntime.preload_dlls()


def missing() -> DeviceError | None:
    """Why ONNX Runtime cannot use CUDA, or None where nothing is seen to be missing."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return DeviceError("this ONNX Runtime is a CPU build", "install onnxruntime-gpu in place of onnxruntime")
    if not has_driver():
        return DeviceError(
            f"ONNX Runtime cannot use CUDA: no NVIDIA driver here ({_DRIVER} does not load)", "use --device cpu"
        )
    preload()
    problem = loading_problem("shared") or loading_problem("cuda")
    return DeviceError(f"ONNX Runtime cannot use CUDA ({problem})", _INSTALL) if problem else None


def loading_problem(name: str) -> str | None:
    """Why the library of one of ONNX Runtime's providers does not load, in the loader's words; None where it does."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    problems = (_load_problem(str(library)) for library in folder.glob(f"*onnxruntime_providers_{name}.*"))
    return next((problem for problem in problems if problem), None)


def cuda_major() -> str:
    """The major version of CUDA that ONNX Runtime was built with, as "13"; empty for a CPU build."""
    from onnxruntime.capi import build_and_package_info

    return str(getattr(build_and_package_info, "cuda_version", "")).partition(".")[0]


def _load_problem(library: str) -> str | None:
    try:
        # Global, because the CUDA provider takes symbols from the shared one without naming it.
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None
