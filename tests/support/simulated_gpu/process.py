"""Run functions in a Python process on a machine with simulated GPUs."""

import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar
from unittest.mock import patch

P = ParamSpec("P")
T = TypeVar("T")


class SimulatedGpuProcess:
    """A process in which the CUDA libraries are simulated. It runs one function after the other, and is reused.

    Args:
        libraries: the paths of the simulated libraries.
        devices: the number of GPUs.
        mebibytes: the memory of each GPU.
    """

    def __init__(self, libraries: Sequence[Path], devices: int = 1, mebibytes: int = 80 << 10) -> None:
        self._environment = {
            "LD_PRELOAD": " ".join(map(str, libraries)),
            "SIMULATED_GPU_DEVICES": str(devices),
            "SIMULATED_GPU_MIB": str(mebibytes),
            "OMP_NUM_THREADS": "1",
        }
        # The directory of the test that starts the process is deleted when that test has passed.
        directory = tempfile.gettempdir()
        self._executor = ProcessPoolExecutor(1, get_context("spawn"), initializer=os.chdir, initargs=(directory,))

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of a function of a module, which runs in the process. All values must be picklable.

        Raises:
            AssertionError: the function raised an exception. The message is its traceback.
        """
        with patch.dict(os.environ, self._environment):  # the process starts with the first call
            result, problem = self._executor.submit(_call, function, args, kwargs).result()
        assert problem is None, problem
        value: T = result
        return value

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
    """Return the result, or the traceback as text: exceptions with more than one argument cannot be unpickled."""
    try:
        return function(*args, **kwargs), None
    except Exception:
        return None, traceback.format_exc()
