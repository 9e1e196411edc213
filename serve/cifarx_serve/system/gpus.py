"""The NVIDIA GPUs of this machine: their names and their used memory. This starts no CUDA in this process."""

import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

_DRIVER_FOLDER: Final = Path("/proc/driver/nvidia/gpus")

_MAX_NAME: Final = 96
"""`NVML_DEVICE_NAME_V2_BUFFER_SIZE`"""


def gpu_names() -> tuple[str, ...]:
    """Return the names of the NVIDIA GPUs: from the driver in /proc or, in a sandbox that hides it, from NVML."""
    return _names_in_proc() or _names_in_nvml()


def used_gpu_memory() -> int | None:
    """Return the used memory of all NVIDIA GPUs together, of all processes, in bytes; None if NVML cannot read it."""
    import ctypes

    class Memory(ctypes.Structure):
        """`nvmlMemory_t`"""

        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    memory, used = Memory(), 0
    if not (handles := _nvml_devices()):
        return None
    for handle in handles:
        if _nvml().nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        used += memory.used
    return used


def _names_in_proc() -> tuple[str, ...]:
    if sys.platform != "linux" or not _DRIVER_FOLDER.is_dir():
        return ()
    names = []
    for information in sorted(_DRIVER_FOLDER.glob("*/information")):
        for line in information.read_text().splitlines():
            if line.startswith("Model"):
                names.append(line.partition(":")[2].strip())
    return tuple(names)


def _names_in_nvml() -> tuple[str, ...]:
    import ctypes

    names = []
    for handle in _nvml_devices():
        name = ctypes.create_string_buffer(_MAX_NAME)
        if not _nvml().nvmlDeviceGetName(handle, name, _MAX_NAME):
            names.append(name.value.decode())
    return tuple(names)


def _nvml_devices() -> list[Any]:
    """Return the handles of all GPUs, none if there is no driver."""
    import ctypes

    library, count = _nvml(), ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    handles = [ctypes.c_void_p() for _ in range(count.value)]
    return [
        handle
        for index, handle in enumerate(handles)
        if not library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
    ]


@cache
def _nvml() -> Any:
    """Return NVIDIA's management library, initialized, or None. Its functions return 0 if they succeed."""
    import ctypes

    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
