"""Time between two events on a CUDA device, by CUDA's own runtime library. Imports no PyTorch."""

import ctypes
import sys
from collections.abc import Callable
from typing import Any, Final

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.errors import DeviceError

_NON_BLOCKING: Final = 1
"""`cudaStreamNonBlocking`: the stream does not wait for the legacy default stream."""


class CudaClock:
    """A stream on a device and two events to record on it, until it is closed.

    Args:
        runtime: the library, libcudart.
        number: of the device.

    Attributes:
        stream: the address of the `cudaStream_t`, for a library that is to work on it; closing destroys it, so that
            must end first.

    Raises:
        DeviceError: the device cannot be had.
    """

    def __init__(self, runtime: Any, number: int) -> None:
        self._runtime = runtime
        self._events = (ctypes.c_void_p(), ctypes.c_void_p())
        stream = ctypes.c_void_p()
        self._call("cudaSetDevice", number)
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        for event in self._events:
            self._call("cudaEventCreate", ctypes.byref(event))
        self.stream: int = stream.value or 0

    def time(self, work: Callable[[], object]) -> float:
        """Microseconds from the start to the end, on the device, of what `work` puts on the stream.

        Where the host waits in between, its waiting is part of the time.
        """
        started, ended = self._events
        stream = ctypes.c_void_p(self.stream)
        self._call("cudaEventRecord", started, stream)
        work()
        self._call("cudaEventRecord", ended, stream)
        self._call("cudaEventSynchronize", ended)
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), started, ended)
        return milliseconds.value * 1e3

    def close(self) -> None:
        """Destroy the events and the stream."""
        for event in self._events:
            self._call("cudaEventDestroy", event)
        self._call("cudaStreamDestroy", ctypes.c_void_p(self.stream))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._runtime, name)(*arguments):
            describe = self._runtime.cudaGetErrorString
            describe.restype = ctypes.c_char_p
            raise DeviceError(f"{name} failed ({describe(status).decode()})", "run `cifarx doctor`")


def open_clock(number: int) -> CudaClock | None:
    """A clock of a device, by the library that ONNX Runtime's provider loads; None where there is none.

    Raises:
        DeviceError: the device cannot be had.
    """
    cuda_libraries.preload()
    major = cuda_libraries.cuda_major()
    try:
        runtime = ctypes.CDLL(f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}")
    except OSError:
        return None
    return CudaClock(runtime, number)
