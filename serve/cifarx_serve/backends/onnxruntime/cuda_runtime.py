"""Call the CUDA runtime library that ONNX Runtime's provider uses. This module imports no PyTorch."""

import ctypes
import sys
from contextlib import suppress
from typing import Any

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.errors import DeviceError


def load_cuda_runtime() -> Any | None:
    """Return the CUDA runtime library, libcudart, or None if it is not installed."""
    cuda_libraries.preload()
    major = cuda_libraries.cuda_major_version()
    try:
        return ctypes.CDLL(f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}")
    except OSError:
        return None


def call(library: Any, function: str, *arguments: Any) -> None:
    """Call a function of the CUDA runtime library by its name.

    Raises:
        DeviceError: the function failed.
    """
    if status := getattr(library, function)(*arguments):
        describe = library.cudaGetErrorString
        describe.restype = ctypes.c_char_p
        raise DeviceError(f"{function} failed ({describe(status).decode()})", "run `cifarx doctor`")


def free_memory(index: int) -> int | None:
    """Return the free memory of a CUDA device in bytes, or None if it cannot be read."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if library := load_cuda_runtime():
        with suppress(DeviceError):
            call(library, "cudaSetDevice", index)
            call(library, "cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
            return free.value
    return None
