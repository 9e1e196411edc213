"""Recognize ONNX Runtime's out-of-memory errors."""

import re
from typing import Final

from cifarx_serve.backends.onnxruntime.cuda_runtime import free_memory
from cifarx_serve.devices import Device, out_of_memory_error
from cifarx_serve.errors import DeviceMemoryError

# From the library's own allocator, the CUDA runtime, and cuBLAS or cuDNN.
_OUT_OF_MEMORY: Final = re.compile(r"Failed to allocate memory|out of memory|ALLOC(ATION)?_FAILED|bad_alloc")
_REQUESTED: Final = re.compile(r"requested buffer of size (\d+)")


def memory_error(error: BaseException, device: Device, batch_size: int | None = None) -> DeviceMemoryError | None:
    """Return the error for a session or a run that failed for lack of memory, or None if that is not the reason.

    Args:
        error: the exception of the library.
        device: the device of the session.
        batch_size: the number of images in the batch, or None if the session could not be created.
    """
    message = str(error)
    if not _OUT_OF_MEMORY.search(message):
        return None
    requested = _REQUESTED.search(message)
    free = None if device.type == "cpu" else free_memory(device.index)
    return out_of_memory_error(str(device), batch_size, int(requested[1]) if requested else None, free)
