"""The CPUs this process may use, according to its affinity mask and cgroup quota rather than the machine's count."""

import math
import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = Path("/sys/fs/cgroup/cpu")

_limit: int | None = None


def set_cpu_limit(count: int) -> None:
    """Limit this process to `count` CPUs because other processes need the rest. Idle threads then do not spin.

    Call this before a model is opened.
    """
    global _limit  # noqa: PLW0603  the limit belongs to the process
    _limit = count


def has_cpu_limit() -> bool:
    """Return whether `set_cpu_limit` was called, so that other processes compete for the CPUs."""
    return _limit is not None


def available_cpus() -> int:
    """Return the number of CPUs this process may use, at least 1.

    This is the size of the scheduler's affinity mask, limited by the cgroup's quota and by `set_cpu_limit`.
    `os.cpu_count()` counts the whole machine, so a container with two of 64 CPUs would start 64 threads.
    """
    try:
        affinity = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        affinity = os.cpu_count() or 1
    quota = _cgroup_quota()
    allowed = affinity if quota is None else min(affinity, math.ceil(quota))
    return max(1, allowed if _limit is None else min(allowed, _limit))


def _cgroup_quota() -> float | None:
    """Return the number of CPUs that the cgroup allows, or None without a quota."""
    try:
        if _CGROUP_V2.exists():
            quota, period = _CGROUP_V2.read_text().split()
        else:
            quota = (_CGROUP_V1 / "cpu.cfs_quota_us").read_text()
            period = (_CGROUP_V1 / "cpu.cfs_period_us").read_text()
        allowed = int(quota)
        return allowed / int(period) if allowed > 0 else None
    except (OSError, ValueError):  # no cgroup file system, or the quota is "max"
        return None
