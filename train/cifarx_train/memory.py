"""The memory that a run takes."""

import re
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, of this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_process()


def _peak_of_process() -> int:
    if sys.platform == "linux":
        # Not getrusage: there its figure survives exec, and so counts the program that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if high := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(high[1]) * 1024
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
