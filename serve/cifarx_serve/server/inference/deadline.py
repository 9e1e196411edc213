"""The deadline of a request, and work in threads until then."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


async def wait_for_slot(slots: asyncio.Semaphore, deadline: Deadline) -> None:
    """Acquire a semaphore.

    Raises:
        DeadlineExceeded: the deadline passed first.
    """
    try:
        if not slots.locked():
            await slots.acquire()  # at once: a timer would only cost time
            return
        async with asyncio.timeout(deadline.remaining_s()):
            await slots.acquire()
    except TimeoutError as error:
        raise deadline.exceeded() from error


class ThreadPool:
    """Threads for work that would block the event loop. Use it in one event loop.

    Calls wait for a thread in the event loop rather than in a queue, so that the arguments of one that has missed its
    deadline are not kept.

    Args:
        threads: the number of threads.
        name: the start of their names.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._slots = asyncio.Semaphore(threads)
        self._executor = ThreadPoolExecutor(threads, name)

    async def run(self, deadline: Deadline, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run a function in a thread, and return its result. The thread does not use the arguments afterwards.

        Raises:
            DeadlineExceeded: the deadline has passed. A function that was running has been waited for.
            Exception: whatever the function raises.
        """
        await wait_for_slot(self._slots, deadline)
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        finally:
            self._slots.release()
        if not deadline.remaining_s():
            raise deadline.exceeded()
        return result

    def close(self) -> None:
        """Let the threads end."""
        self._executor.shutdown(wait=False, cancel_futures=True)
