"""How many CPUs this process may use: affinity and cgroup limits, not what the machine has."""

import math
import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = Path("/sys/fs/cgroup/cpu")

_share: int | None = None


def share_cpus(count: int) -> None:
    """Leave the other CPUs to other processes: from now on this one takes `count`, and its threads do not spin.

    To be called before a model is opened.
    """
    global _share  # noqa: PLW0603  a process has one share
    _share = count


def shares_cpus() -> bool:
    """Whether other processes wait for the CPUs that this one does not need."""
    return _share is not None


def available_cpus() -> int:
    """CPUs by the scheduler's affinity mask, cut to the cgroup's quota and to this process's share, at least 1.

    `os.cpu_count()` counts the whole machine, so a container with two CPUs of sixty-four would start
    sixty-four threads.
    """
    try:
        affinity = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        affinity = os.cpu_count() or 1
    quota = _cgroup_quota()
    allowed = affinity if quota is None else min(affinity, math.ceil(quota))
    return max(1, allowed if _share is None else min(allowed, _share))


def _cgroup_quota() -> float | None:
    """CPUs allowed by the container's quota, or None where there is none."""
    try:
        if _CGROUP_V2.exists():
            quota, period = _CGROUP_V2.read_text().split()
        else:
            quota = (_CGROUP_V1 / "cpu.cfs_quota_us").read_text()
            period = (_CGROUP_V1 / "cpu.cfs_period_us").read_text()
        allowed = int(quota)
        return allowed / int(period) if allowed > 0 else None
    except (OSError, ValueError):  # no cgroup file system, or "max"
        return None
