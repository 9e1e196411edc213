"""What the tests of the runtime share: a Python of its own, for what must hold of a process as a whole."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import settings

# A shared machine may take its time over any one example.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture
def fresh_python() -> Callable[..., str]:
    """`fresh_python(code, *arguments)` runs in a process of its own and gives what it printed."""

    def run(code: str, *arguments: object) -> str:
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    return run
