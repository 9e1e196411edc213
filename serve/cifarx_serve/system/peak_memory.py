"""The most memory that this process has held."""

import re
import sys
from pathlib import Path


def peak_memory() -> int:
    """Bytes of resident memory at the highest, since this program began."""
    if sys.platform == "linux":
        # Not getrusage: there its figure survives exec, and so counts the program that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if high := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(high[1]) * 1024
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
