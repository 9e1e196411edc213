import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifarx_serve.server.inference.deadline import Deadline, run_in_threadpool
from cifarx_serve.server.inference.errors import DeadlineExceeded


def test_remaining_time_ends_at_zero() -> None:
    assert Deadline(time.perf_counter(), 10.0).remaining_s() == pytest.approx(10.0, abs=1.0)
    assert Deadline(time.perf_counter() - 11.0, 10.0).remaining_s() == 0.0


def test_work_in_the_threadpool_is_abandoned_at_the_deadline() -> None:
    async def test() -> None:
        free = threading.Event()
        deadline = Deadline(time.perf_counter(), 0.05)
        with ThreadPoolExecutor(1) as executor:
            assert await run_in_threadpool(executor, deadline, max, 3, 4) == 4
            with pytest.raises(DeadlineExceeded) as exceeded:
                await run_in_threadpool(executor, deadline, free.wait, 30)
            free.set()
        assert str(exceeded.value) == "no response within 0.05 s: try again when the server is less busy"

    asyncio.run(test())


def test_an_error_in_the_threadpool_is_raised() -> None:
    async def test() -> None:
        with ThreadPoolExecutor(1) as executor, pytest.raises(ZeroDivisionError):
            await run_in_threadpool(executor, Deadline(time.perf_counter(), 30.0), divmod, 1, 0)

    asyncio.run(test())
