"""The counters of the simulated CUDA libraries, in a process that runs with them. `runtime.c` lists their names."""

import ctypes
from functools import cache


def counters(device: int = 0) -> dict[str, int]:
    """Return what happened on a device so far, such as the number of `captures`, `graph_launches` and `kernels`."""
    library = _library()
    names = [library.simulated_counter_name(number).decode() for number in range(library.simulated_counter_count())]
    return {name: library.simulated_counter(number, device) for number, name in enumerate(names)}


def changes(before: dict[str, int], device: int = 0) -> dict[str, int]:
    """Return by how much the counters of a device grew since `before`, without those that did not change."""
    return {name: count - before[name] for name, count in counters(device).items() if count != before[name]}


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)  # the process itself: the libraries are preloaded
    library.simulated_counter_name.restype = ctypes.c_char_p
    library.simulated_counter.restype = ctypes.c_long
    return library
