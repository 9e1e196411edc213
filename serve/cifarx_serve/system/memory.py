"""The memory of this process."""

import re
import sys
from pathlib import Path


def peak_process_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    if sys.platform == "linux":
        # Not `getrusage`: its maximum survives exec, so it includes the program that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if high := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(high[1]) * 1024
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
