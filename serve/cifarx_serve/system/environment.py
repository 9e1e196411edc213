"""The hardware and software that a measurement was made with. Every report includes it."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cifarx_serve.system.cpus import available_cpus
from cifarx_serve.system.gpus import gpu_names
from cifarx_serve.system.versions import library_versions


class Environment(msgspec.Struct, frozen=True):
    """The machine, operating system and libraries of a process.

    Attributes:
        system: the operating system, its release and the machine type.
        python: the version of Python.
        cpu: the CPU model.
        cpus: the number of CPUs of the machine.
        threads: the number of CPUs this process may use.
        gpus: the names of the NVIDIA GPUs.
        versions: the installed version of each library.
        clock_mhz: the current mean clock rate of the CPUs, or None if the system does not report it.
    """

    system: str
    python: str
    cpu: str
    cpus: int
    threads: int
    gpus: tuple[str, ...]
    versions: dict[str, str]
    clock_mhz: float | None = None


def current_environment() -> Environment:
    """Return the environment of this process."""
    return Environment(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=next(_cpuinfo("model name"), platform.processor() or platform.machine()),
        cpus=os.cpu_count() or 1,
        threads=available_cpus(),
        gpus=gpu_names(),
        versions=library_versions(),
        clock_mhz=_mean_clock(),
    )


def _cpuinfo(key: str) -> Iterator[str]:
    """Iterate over the values of a key in /proc/cpuinfo, one per CPU. There are none outside Linux."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return (line.partition(":")[2].strip() for line in lines if line.startswith(key))


def _mean_clock() -> float | None:
    clocks = [float(clock) for clock in _cpuinfo("cpu MHz")]
    return round(sum(clocks) / len(clocks)) if clocks else None
