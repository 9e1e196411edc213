"""The machine and the libraries a figure was measured with: every report carries them."""

import os
import platform
import sys
from pathlib import Path

import msgspec

from cifarx_serve.threads import available_cpus
from cifarx_serve.versions import library_versions


class Environment(msgspec.Struct, frozen=True):
    """`threads` is the number of CPUs this process may use, `cpus` what the machine has."""

    system: str
    python: str
    cpu: str
    cpus: int
    threads: int
    gpus: tuple[str, ...]
    versions: dict[str, str]


def environment() -> Environment:
    """Of this process, now."""
    return Environment(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=_cpu_name(),
        cpus=os.cpu_count() or 1,
        threads=available_cpus(),
        gpus=_gpu_names(),
        versions=library_versions(),
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


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
