"""Measure time on a CUDA device with events of the CUDA runtime library. This module imports no PyTorch."""

import ctypes
from collections.abc import Callable
from typing import Any, Final

from cifarx_serve.backends.onnxruntime.cuda_runtime import call, load_cuda_runtime

_NON_BLOCKING: Final = 1
"""`cudaStreamNonBlocking`: the stream does not synchronize with the legacy default stream."""


class CudaTimer:
    """A CUDA stream and two events to record on it.

    Args:
        runtime: the CUDA runtime library, libcudart.
        index: the index of the device.

    Attributes:
        stream: the address of the `cudaStream_t`, for a library that runs its work on it. `close` destroys the stream,
            so that work must end first.

    Raises:
        DeviceError: the device is not available.
    """

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime = runtime
        self._events = (ctypes.c_void_p(), ctypes.c_void_p())
        stream = ctypes.c_void_p()
        self._call("cudaSetDevice", index)
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        for event in self._events:
            self._call("cudaEventCreate", ctypes.byref(event))
        self.stream: int = stream.value or 0

    def time(self, function: Callable[[], object]) -> float:
        """Return the time on the device, in microseconds, of the work that `function` enqueues on the stream.

        This includes any time that the device waits for the host in between.
        """
        start, end = self._events
        stream = ctypes.c_void_p(self.stream)
        self._call("cudaEventRecord", start, stream)
        function()
        self._call("cudaEventRecord", end, stream)
        self._call("cudaEventSynchronize", end)
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return milliseconds.value * 1e3

    def close(self) -> None:
        """Destroy the events and the stream."""
        for event in self._events:
            self._call("cudaEventDestroy", event)
        self._call("cudaStreamDestroy", ctypes.c_void_p(self.stream))

    def _call(self, function: str, *arguments: Any) -> None:
        call(self._runtime, function, *arguments)


def open_cuda_timer(index: int) -> CudaTimer | None:
    """Return a timer for a device, or None if the CUDA runtime library of ONNX Runtime's provider is not installed.

    Raises:
        DeviceError: the device is not available.
    """
    runtime = load_cuda_runtime()
    return CudaTimer(runtime, index) if runtime else None
