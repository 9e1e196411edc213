"""What ONNX Runtime needs for TensorRT: load it, and say what is missing."""

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

_OURS: Final = re.compile(r"libnv(?:infer|onnxparser)\w*\.so\.(\d+)")
"""TensorRT's libraries, as the loader names them; they end in the major version that ONNX Runtime was built with."""

_MAJORS: Final = ("10", "11")
"""Of TensorRT: the one that ONNX Runtime 1.31 was built with, and the next."""

_TF32: Final = "NVIDIA_TF32_OVERRIDE"


@cache
def preload() -> None:
    """Load TensorRT and CUDA as pip installed them, which the system's loader does not look for.

    Also switches TF32 off for this process: TensorRT takes it by default, fp32 means fp32, and the provider of ONNX
    Runtime 1.31 has no option for it.
    """
    os.environ[_TF32] = "0"
    cuda_libraries.preload()
    try:
        import_module("tensorrt_libs")  # loads every library that it brings
    except ImportError:
        return  # the system may have them: `missing` says so where it has not


def version() -> int | None:
    """Of the TensorRT that is loaded, 101601 for 10.16.1; None where there is none."""
    preload()
    for major in _MAJORS:
        with suppress(OSError):
            name = f"nvinfer_{major}.dll" if sys.platform == "win32" else f"libnvinfer.so.{major}"
            return int(ctypes.CDLL(name).getInferLibVersion())
    return None


def missing() -> DeviceError | None:
    """Why ONNX Runtime cannot use TensorRT, or None where nothing is seen to be missing."""
    import onnxruntime

    if problem := cuda_libraries.missing():
        return problem
    if _PROVIDER not in onnxruntime.get_available_providers():
        return DeviceError("this ONNX Runtime is built without TensorRT", "use --device cuda")
    preload()
    reason = cuda_libraries.loading_problem("tensorrt")
    return DeviceError(f"ONNX Runtime cannot use TensorRT ({reason})", _remedy(reason)) if reason else None


def _remedy(reason: str) -> str:
    """What brings the library that the loader did not find; a newer major version of TensorRT is another library."""
    found = _OURS.search(reason)
    major = found[1] if found else _MAJORS[0]
    return f'pip install "tensorrt-cu{cuda_libraries.cuda_major()}-libs=={major}.*"'
