import os
import subprocess
import sys

import psutil
import pytest

from cifarx_serve.system.memory import peak_process_memory


def test_the_peak_is_at_least_the_current_memory_and_less_than_all_memory() -> None:
    # Bytes and not kilobytes: a thousandth of it would be below, a thousandfold above.
    assert 0.9 * psutil.Process().memory_info().rss <= peak_process_memory() < psutil.virtual_memory().total


# Runs in a new process, whose peak no other test has raised.
_BLOCK = """
import numpy as np
from cifarx_serve.system.memory import peak_process_memory

size = 256 * 2**20
before = peak_process_memory()
block = np.ones(size, np.uint8)
top = peak_process_memory()
assert before + 0.8 * size <= top <= before + 1.5 * size, (before, top)
del block
assert peak_process_memory() >= 0.98 * top  # the kernel counts in batches
"""


# Through a small process, because on Linux `getrusage` includes the peak of the launcher.
_SMALL = '"$0" -c "$1"; exit $?'


@pytest.mark.skipif(os.name == "nt", reason="there is no sh")
def test_the_peak_remains_after_memory_is_freed() -> None:
    command = ["sh", "-c", _SMALL, sys.executable, _BLOCK]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


_LAUNCHER = """
import subprocess, sys
held = bytearray(b"x") * (600 * 2**20)
code = "from cifarx_serve.system.memory import peak_process_memory; print(peak_process_memory())"
sys.exit(subprocess.run([sys.executable, "-c", code]).returncode)
"""


def test_the_memory_of_the_launcher_does_not_count() -> None:
    ran = subprocess.run([sys.executable, "-c", _LAUNCHER], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert 2**22 < int(ran.stdout) < 400 * 2**20
