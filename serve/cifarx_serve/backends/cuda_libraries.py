"""Load the libraries that ONNX Runtime needs for CUDA, and report what is missing. This module imports no PyTorch."""

import contextlib
import ctypes
import io
import re
import sys
from functools import cache
from pathlib import Path
from typing import Final

from cifarx_serve.errors import DeviceError

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# The packages for CUDA 13; those for CUDA 12 have the suffix "-cu12".
_PACKAGES: Final = {
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "cudart": "nvidia-cuda-runtime",
    "cudnn": "nvidia-cudnn",
    "cufft": "nvidia-cufft",
    "curand": "nvidia-curand",
    "nvrtc": "nvidia-cuda-nvrtc",
}


@cache
def has_driver() -> bool:
    """Return whether an NVIDIA driver is installed. Without one, no other library helps."""
    return _load_error(_DRIVER) is None


@cache
def preload() -> None:
    """Load the CUDA and cuDNN libraries that pip installed, where the system's loader does not search."""
    import onnxruntime

    # It prints what it cannot load; `availability_error` reports that in one line.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def availability_error() -> DeviceError | None:
    """Return why ONNX Runtime cannot use CUDA, or None if nothing appears to be missing."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return DeviceError(
            "the installed ONNX Runtime is a CPU build", "install onnxruntime-gpu in place of onnxruntime"
        )
    if not has_driver():
        return DeviceError(
            f"ONNX Runtime cannot use CUDA: no NVIDIA driver found ({_DRIVER} does not load)", "use --device cpu"
        )
    preload()
    problem = provider_load_error("shared") or provider_load_error("cuda")
    return DeviceError(f"ONNX Runtime cannot use CUDA ({problem})", _install_command(problem)) if problem else None


def _install_command(problem: str) -> str:
    """Return the command that installs what the loader did not find: the package of a library, or all of them."""
    library = re.match(r"lib(\w+)\.so", problem)
    if library is None or (package := _PACKAGES.get(library[1])) is None:
        return 'pip install "cifarx[cuda]"'
    major = cuda_major_version()
    suffix = f"-cu{major}" if major == "12" or package == "nvidia-cudnn" else ""
    return f'pip install {package}{suffix}, or all CUDA libraries: pip install "cifarx[cuda]"'


def provider_load_error(name: str) -> str | None:
    """Return the loader's message if the library of an execution provider of ONNX Runtime does not load, or None.

    Args:
        name: the provider, as in the name of its library: "shared", "cuda" or "tensorrt".
    """
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    problems = (_load_error(str(library)) for library in folder.glob(f"*onnxruntime_providers_{name}.*"))
    return next((problem for problem in problems if problem), None)


def cuda_major_version() -> str:
    """Return the major version of CUDA that ONNX Runtime was built with, such as "13", or "" for a CPU build."""
    from onnxruntime.capi import build_and_package_info

    return str(getattr(build_and_package_info, "cuda_version", "")).partition(".")[0]


def _load_error(library: str) -> str | None:
    try:
        # RTLD_GLOBAL because the CUDA provider uses symbols of the shared provider without linking to it.
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None
