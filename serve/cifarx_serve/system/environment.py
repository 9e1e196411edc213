"""The machine and the libraries a figure was measured with: every report carries them."""

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cifarx_serve.system.cpus import available_cpus
from cifarx_serve.system.versions import library_versions


class Environment(msgspec.Struct, frozen=True):
    """`threads` is the number of CPUs this process may use, `cpus` what the machine has.

    `clock_mhz` is their mean clock now, None where the system does not say.
    """

    system: str
    python: str
    cpu: str
    cpus: int
    threads: int
    gpus: tuple[str, ...]
    versions: dict[str, str]
    clock_mhz: float | None = None


def environment() -> Environment:
    """Of this process, now."""
    return Environment(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=next(_cpu_facts("model name"), platform.processor() or platform.machine()),
        cpus=os.cpu_count() or 1,
        threads=available_cpus(),
        gpus=_gpu_names(),
        versions=library_versions(),
        clock_mhz=_clock(),
    )


def _cpu_facts(name: str) -> Iterator[str]:
    """One of each CPU; none where it is not Linux."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return (line.partition(":")[2].strip() for line in lines if line.startswith(name))


def _clock() -> float | None:
    clocks = [float(clock) for clock in _cpu_facts("cpu MHz")]
    return round(sum(clocks) / len(clocks)) if clocks else None


def _gpu_names() -> tuple[str, ...]:
    """NVIDIA GPUs as the driver's /proc lists them: no library is loaded to ask."""
    folder = Path("/proc/driver/nvidia/gpus")
    if sys.platform != "linux" or not folder.is_dir():
        return ()
    names = []
    for information in sorted(folder.glob("*/information")):
        for line in information.read_text().splitlines():
            if line.startswith("Model"):
                names.append(line.partition(":")[2].strip())
    return tuple(names)
