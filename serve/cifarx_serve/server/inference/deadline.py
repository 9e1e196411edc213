"""The deadline of a request, and work in a thread pool that is abandoned when it passes."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import NamedTuple, TypeVar, TypeVarTuple

from cifarx_serve.server.inference.errors import DeadlineExceeded

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class Deadline(NamedTuple):
    """The time by which a request must be answered.

    Attributes:
        started_at: when the request arrived, on the clock of `time.perf_counter`.
        timeout_s: the time allowed from then on, in seconds.
    """

    started_at: float
    timeout_s: float

    @property
    def expires_at(self) -> float:
        """When the deadline passes, on the clock of `time.perf_counter`."""
        return self.started_at + self.timeout_s

    def remaining_s(self) -> float:
        """Return the seconds left; 0 once the deadline has passed."""
        return max(0.0, self.expires_at - time.perf_counter())

    def exceeded(self) -> DeadlineExceeded:
        """Return the error for a request that missed this deadline."""
        return DeadlineExceeded(f"no response within {self.timeout_s:g} s", "try again when the server is less busy")


async def run_in_threadpool(
    executor: Executor, deadline: Deadline, function: Callable[[*Arguments], Result], *arguments: *Arguments
) -> Result:
    """Run a function that would block the event loop in a thread pool, and return its result.

    Raises:
        DeadlineExceeded: the deadline passed first. A thread that has started the function still finishes it.
        Exception: whatever the function raises.
    """
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
    except TimeoutError as error:
        raise deadline.exceeded() from error
