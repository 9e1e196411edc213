import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest

from cifarx_serve.server.inference.deadline import Deadline, ThreadPool
from cifarx_serve.server.inference.errors import DeadlineExceeded


def test_remaining_time_ends_at_zero() -> None:
    assert Deadline(time.perf_counter(), 10.0).remaining_s() == pytest.approx(10.0, abs=1.0)
    assert Deadline(time.perf_counter() - 11.0, 10.0).remaining_s() == 0.0


def run_with_threads(test: Callable[[ThreadPool], Awaitable[None]]) -> None:
    async def run() -> None:
        with closing(ThreadPool(1, "work")) as threads:
            await test(threads)

    asyncio.run(run())


def after(seconds: float) -> Deadline:
    return Deadline(time.perf_counter(), seconds)


def test_a_function_runs_in_a_thread() -> None:
    async def test(threads: ThreadPool) -> None:
        assert await threads.run(after(30.0), max, 3, 4) == 4
        assert await threads.run(after(30.0), threading.current_thread) is not threading.main_thread()
        with pytest.raises(ZeroDivisionError):
            await threads.run(after(30.0), divmod, 1, 0)

    run_with_threads(test)


def test_a_call_that_waits_for_a_thread_fails_at_its_deadline() -> None:
    async def test(threads: ThreadPool) -> None:
        free = threading.Event()
        running = asyncio.ensure_future(threads.run(after(30.0), free.wait, 30))
        await asyncio.sleep(0.01)
        started = time.perf_counter()
        with pytest.raises(
            DeadlineExceeded, match=r"^no response within 0\.05 s: try again when the server is less busy$"
        ):
            await threads.run(after(0.05), max, 3, 4)
        assert time.perf_counter() - started < 5.0
        free.set()
        assert await running

    run_with_threads(test)


def test_the_arguments_of_a_call_that_missed_its_deadline_are_not_kept() -> None:
    class Body:
        """An object that can be observed, unlike bytes."""

    async def test(threads: ThreadPool) -> None:
        free = threading.Event()
        running = asyncio.ensure_future(threads.run(after(30.0), free.wait, 30))
        await asyncio.sleep(0.01)
        body = Body()
        kept = weakref.ref(body)
        with pytest.raises(DeadlineExceeded):
            await threads.run(after(0.02), id, body)
        del body
        gc.collect()
        assert kept() is None
        free.set()
        await running

    run_with_threads(test)


def test_a_function_that_runs_at_the_deadline_is_waited_for() -> None:
    """It still uses its arguments, whose memory is counted until the request ends."""

    async def test(threads: ThreadPool) -> None:
        ended: list[float] = []

        def work() -> None:
            time.sleep(0.1)
            ended.append(time.perf_counter())

        with pytest.raises(DeadlineExceeded):
            await threads.run(after(0.02), work)
        assert len(ended) == 1

    run_with_threads(test)
