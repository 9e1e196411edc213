"""Load the libraries that ONNX Runtime needs for TensorRT, and report what is missing."""

import ctypes
import os
import re
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Final

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.errors import DeviceError

_PROVIDER: Final = "TensorrtExecutionProvider"

_LIBRARY: Final = re.compile(r"libnv(?:infer|onnxparser)\w*\.so\.(\d+)")
"""The TensorRT libraries in a message of the loader, with the major version that ONNX Runtime was built with."""

_MAJOR_VERSIONS: Final = ("10", "11")
"""The versions of TensorRT to look for: the one that ONNX Runtime 1.31 was built with, and the next."""

_TF32: Final = "NVIDIA_TF32_OVERRIDE"


@cache
def preload() -> None:
    """Load the TensorRT and CUDA libraries that pip installed, where the system's loader does not search.

    This also disables TF32 in this process. TensorRT uses it by default, which is less than fp32's precision, and the
    TensorRT provider of ONNX Runtime 1.31 has no option for it.
    """
    os.environ[_TF32] = "0"
    cuda_libraries.preload()
    try:
        import_module("tensorrt_libs")  # loads all of its libraries
    except ImportError:
        return  # the system may provide them; if not, `availability_error` reports it


def version() -> int | None:
    """Return the version of the loaded TensorRT, such as 101601 for 10.16.1, or None if there is none."""
    preload()
    for major in _MAJOR_VERSIONS:
        with suppress(OSError):
            name = f"nvinfer_{major}.dll" if sys.platform == "win32" else f"libnvinfer.so.{major}"
            return int(ctypes.CDLL(name).getInferLibVersion())
    return None


def availability_error() -> DeviceError | None:
    """Return why ONNX Runtime cannot use TensorRT, or None if nothing appears to be missing."""
    import onnxruntime

    if error := cuda_libraries.availability_error():
        return error
    if _PROVIDER not in onnxruntime.get_available_providers():
        return DeviceError("the installed ONNX Runtime is built without TensorRT", "use --device cuda")
    preload()
    reason = cuda_libraries.provider_load_error("tensorrt")
    return DeviceError(f"ONNX Runtime cannot use TensorRT ({reason})", _install_command(reason)) if reason else None


def _install_command(reason: str) -> str:
    """Return the command that installs the missing library. Each major version of TensorRT has its own package."""
    found = _LIBRARY.search(reason)
    major = found[1] if found else _MAJOR_VERSIONS[0]
    return f'pip install "tensorrt-cu{cuda_libraries.cuda_major_version()}-libs=={major}.*"'
