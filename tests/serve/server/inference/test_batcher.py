import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cifarx_serve.errors import ModelFileError
from cifarx_serve.predictor import top_predictions
from cifarx_serve.server.inference.batcher import Batcher, BatchEvent, BatchOutput, InferenceResult
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.errors import BatcherClosed, DeadlineExceeded, QueueFull, RequestCancelled
from tests.support.spec_model import make_spec

BAD = 666


class Model:
    """Returns the first number of each image as its logit, and fails on `BAD`. It can be made to block."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.error: Exception = ModelFileError("cannot run", "export it again")
        self._unblocked = threading.Event()
        self._unblocked.set()

    def block(self) -> None:
        self._unblocked.clear()

    def unblock(self) -> None:
        self._unblocked.set()

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        first = images.reshape(len(images), -1)[:, :1]
        self.batches.append(first[:, 0].astype(int).tolist())
        self.shapes.append(images.shape)
        assert self._unblocked.wait(30)
        if (first == BAD).any():
            raise self.error
        return first.astype(np.float32)


class Queue:
    """A batcher with such a model, and the events that it reported."""

    def __init__(self, deadline_s: float = 30.0, **limits: Any) -> None:
        self.model = Model()
        self.events: list[BatchEvent] = []
        self.deadline_s = deadline_s
        limits = {"max_batch": 4, "max_delay_s": 0.0, "max_queue": 100} | limits
        self.batcher = Batcher(self.model.run, on_batch=self.events.append, **limits)

    def submit(
        self,
        *numbers: int,
        shape: tuple[int, ...] = (2,),
        dtype: str = "f4",
        age_s: float = 0.0,
        disconnected: bool = False,
    ) -> "asyncio.Future[InferenceResult]":
        """Submit a request that arrived `age_s` seconds ago, with one image per number, filled with it."""
        images = np.stack([np.full(shape, number, dtype) for number in numbers])
        deadline = Deadline(time.perf_counter() - age_s, self.deadline_s)
        return self.batcher.submit(images, deadline, lambda: disconnected)

    async def submit_and_block(self, number: int = 0) -> "asyncio.Future[InferenceResult]":
        """Submit one image, and wait until the model runs on it and blocks."""
        calls = len(self.model.batches)
        self.model.block()
        future = self.submit(number)
        await wait_until(lambda: len(self.model.batches) > calls)
        return future


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def numbers(result: InferenceResult) -> list[int]:
    return [int(number) for number in result.values[:, 0]]


def run_with_queue(test: Callable[[Queue], Awaitable[None]], **options: Any) -> Queue:
    """Run a test with a queue in an event loop of its own, and return the queue."""

    async def run() -> Queue:
        queue = Queue(**options)
        try:
            await test(queue)
        finally:
            queue.model.unblock()
            queue.batcher.close()
        return queue

    return asyncio.run(run())


def submit_to(batcher: Batcher, images: NDArray[Any]) -> "asyncio.Future[InferenceResult]":
    return batcher.submit(images, Deadline(time.perf_counter(), 30.0), lambda: False)


def test_one_request_is_one_call() -> None:
    async def test(queue: Queue) -> None:
        result = await queue.submit(7, 8)
        assert numbers(result) == [7, 8]
        assert result.queue_s >= 0
        assert result.compute_s >= 0

    queue = run_with_queue(test)
    assert queue.model.batches == [[7, 8]]


@given(st.integers(1, 12), st.integers(0, 3), st.sampled_from(["softmax", "sigmoid"]))
def test_a_request_gets_the_predictions_of_its_own_images(top_k: int, start: int, activation: str) -> None:
    logits = np.random.default_rng(0).standard_normal((4, 12), np.float32)
    spec = make_spec(class_names=tuple(f"class {n}" for n in range(12)), activation=activation)
    result = InferenceResult(BatchOutput(logits), slice(start, 4), 0.0, 0.0, 0.0)
    np.testing.assert_array_equal(result.values, logits[start:])
    for _ in range(2):
        assert result.top_predictions(spec, top_k) == top_predictions(logits[start:], spec, top_k)


def test_an_idle_model_runs_at_once() -> None:
    """It runs on the first image alone, and then on the images that arrived meanwhile as one batch."""

    async def test(queue: Queue) -> None:
        first = await queue.submit_and_block(0)
        others = [queue.submit(number) for number in (1, 2, 3)]
        await asyncio.sleep(0.02)
        assert queue.model.batches == [[0]]
        queue.model.unblock()
        assert [numbers(result) for result in await asyncio.gather(first, *others)] == [[0], [1], [2], [3]]

    assert run_with_queue(test).model.batches == [[0], [1, 2, 3]]


def test_requests_of_one_event_loop_iteration_are_batched() -> None:
    async def test(queue: Queue) -> None:
        await asyncio.gather(queue.submit(1), queue.submit(2))

    assert run_with_queue(test).model.batches == [[1, 2]]


def test_a_batch_has_at_most_max_batch_images() -> None:
    async def test(queue: Queue) -> None:
        futures = [await queue.submit_and_block(0), *(queue.submit(number) for number in range(1, 8))]
        queue.model.unblock()
        assert [numbers(result)[0] for result in await asyncio.gather(*futures)] == list(range(8))

    assert run_with_queue(test, max_batch=3).model.batches == [[0], [1, 2, 3], [4, 5, 6], [7]]


def test_a_request_that_fits_overtakes_one_that_does_not() -> None:
    async def test(queue: Queue) -> None:
        futures = [
            await queue.submit_and_block(0),
            queue.submit(1, 2),
            queue.submit(3, 4),
            queue.submit(5),
            queue.submit(6),
        ]
        queue.model.unblock()
        await asyncio.gather(*futures)

    assert run_with_queue(test, max_batch=3).model.batches == [[0], [1, 2, 5], [3, 4, 6]]


def test_a_request_larger_than_a_batch_is_split() -> None:
    async def test(queue: Queue) -> None:
        assert numbers(await queue.submit(*range(7))) == list(range(7))

    queue = run_with_queue(test, max_batch=3)
    assert queue.model.batches == [[0, 1, 2], [3, 4, 5], [6]]
    assert [event.images for event in queue.events] == [7]


def test_images_of_different_shape_or_dtype_are_not_batched() -> None:
    async def test(queue: Queue) -> None:
        futures = [
            await queue.submit_and_block(0),
            queue.submit(1, shape=(2, 2)),
            queue.submit(2, shape=(4,)),
            queue.submit(3, shape=(2, 2)),
            queue.submit(4, shape=(2, 2), dtype="u1"),
            queue.submit(5, shape=(4,)),
        ]
        queue.model.unblock()
        assert [numbers(result)[0] for result in await asyncio.gather(*futures)] == list(range(6))

    queue = run_with_queue(test)
    assert queue.model.batches == [[0], [1, 3], [2, 5], [4]]
    assert queue.model.shapes == [(1, 2), (2, 2, 2), (2, 4), (1, 2, 2)]


def test_an_idle_model_waits_for_a_full_batch_with_max_delay() -> None:
    async def test(queue: Queue) -> None:
        futures = [queue.submit(1), queue.submit(2)]
        await asyncio.sleep(0.05)
        assert queue.model.batches == []
        futures += [queue.submit(3), queue.submit(4)]
        await asyncio.gather(*futures)

    assert run_with_queue(test, max_delay_s=60.0, deadline_s=90.0).model.batches == [[1, 2, 3, 4]]


@pytest.mark.parametrize("delay", [0.0003, 0.01], ids=["polled", "timed"])
def test_an_incomplete_batch_runs_after_max_delay(delay: float) -> None:
    async def test(queue: Queue) -> None:
        started = time.perf_counter()
        await queue.submit(1)
        assert time.perf_counter() - started >= delay

    assert run_with_queue(test, max_delay_s=delay).model.batches == [[1]]


def test_max_delay_counts_from_the_arrival_of_the_request() -> None:
    async def test(queue: Queue) -> None:
        await queue.submit(1, age_s=61)

    run_with_queue(test, max_delay_s=60.0, deadline_s=90.0)


def test_a_full_queue_rejects_requests() -> None:
    async def test(queue: Queue) -> None:
        futures = [await queue.submit_and_block(0), queue.submit(1, 2), queue.submit(3)]
        with pytest.raises(QueueFull) as rejected:
            queue.submit(4)
        assert str(rejected.value) == "the queue is full, with 3 images of at most 3: try again in a second"
        queue.model.unblock()
        await asyncio.gather(*futures)
        assert numbers(await queue.submit(5)) == [5]

    assert run_with_queue(test, max_queue=3).model.batches == [[0], [1, 2, 3], [5]]


def test_an_empty_queue_accepts_any_number_of_images() -> None:
    async def test(queue: Queue) -> None:
        first, large = await queue.submit_and_block(0), queue.submit(*range(1, 6))
        queue.model.unblock()
        await first
        assert numbers(await large) == [1, 2, 3, 4, 5]

    run_with_queue(test, max_queue=3)


def test_a_request_fails_at_its_deadline_and_is_not_run() -> None:
    async def test(queue: Queue) -> None:
        running, queued = await queue.submit_and_block(0), queue.submit(1)
        for future in (running, queued):
            with pytest.raises(DeadlineExceeded) as exceeded:
                await future
            assert str(exceeded.value) == "no response within 0.2 s: try again when the server is less busy"
        queue.model.unblock()
        assert numbers(await queue.submit(2)) == [2]

    assert run_with_queue(test, deadline_s=0.2).model.batches == [[0], [2]]


def test_expired_and_cancelled_requests_leave_the_queue() -> None:
    async def test(queue: Queue) -> None:
        futures = [await queue.submit_and_block(0), queue.submit(1, 2, disconnected=True), queue.submit(3, age_s=29.9)]
        await asyncio.sleep(0.2)
        queue.model.unblock()
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(result) for result in results] == [InferenceResult, RequestCancelled, DeadlineExceeded]
        await wait_until(lambda: queue.batcher.is_idle)
        again = [await queue.submit_and_block(4), queue.submit(5, 6, 7)]
        queue.model.unblock()
        await asyncio.gather(*again)

    queue = run_with_queue(test, max_queue=3)
    assert queue.events[-1].queued_images == 0


def test_an_expired_request_leaves_the_queue_while_the_model_runs() -> None:
    async def test(queue: Queue) -> None:
        running, queued = await queue.submit_and_block(0), queue.submit(1, 1, age_s=29.9)
        with pytest.raises(QueueFull, match="with 2 images of at most 2"):
            queue.submit(2)
        with pytest.raises(DeadlineExceeded, match="no response within 30 s"):
            await queued
        other = queue.submit(2, 2)
        queue.model.unblock()
        assert [numbers(result) for result in await asyncio.gather(running, other)] == [[0], [2, 2]]

    assert run_with_queue(test, max_queue=2).model.batches == [[0], [2, 2]]


def test_the_deadline_counts_from_the_arrival_of_the_request() -> None:
    async def test(queue: Queue) -> None:
        first = await queue.submit_and_block(0)
        with pytest.raises(DeadlineExceeded, match="no response within 30 s"):
            await queue.submit(1, age_s=31)
        queue.model.unblock()
        await first

    assert run_with_queue(test).model.batches == [[0]]


def test_a_request_whose_client_disconnected_is_not_run() -> None:
    async def test(queue: Queue) -> None:
        first = await queue.submit_and_block(0)
        disconnected, connected, cancelled = queue.submit(1, disconnected=True), queue.submit(2), queue.submit(3)
        cancelled.cancel()
        queue.model.unblock()
        assert numbers(await connected) == [2]
        await first
        with pytest.raises(RequestCancelled):
            await disconnected

    assert run_with_queue(test).model.batches == [[0], [2]]


def test_the_model_is_not_called_if_all_clients_disconnected() -> None:
    async def test(queue: Queue) -> None:
        with pytest.raises(RequestCancelled):
            await queue.submit(1, disconnected=True)
        assert queue.batcher.is_idle
        assert numbers(await queue.submit(2)) == [2]

    assert run_with_queue(test).model.batches == [[2]]


@pytest.mark.parametrize("error", [ModelFileError("cannot run", "export it again"), ZeroDivisionError("a defect")])
def test_a_request_that_fails_does_not_fail_the_rest_of_its_batch(error: Exception) -> None:
    async def test(queue: Queue) -> None:
        queue.model.error = error
        futures = [await queue.submit_and_block(0), queue.submit(1), queue.submit(2, BAD), queue.submit(3)]
        queue.model.unblock()
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert results[2] is error
        assert [numbers(result) for result in results if isinstance(result, InferenceResult)] == [[0], [1], [3]]
        assert numbers(await queue.submit(4)) == [4]

    assert run_with_queue(test).model.batches == [[0], [1, 2, BAD, 3], [1], [2, BAD], [3], [4]]


def test_on_batch_is_called_after_every_batch() -> None:
    async def test(queue: Queue) -> None:
        futures = [await queue.submit_and_block(0), queue.submit(1), queue.submit(2, 3), queue.submit(4, 5)]
        queue.model.unblock()
        await asyncio.gather(*futures)

    events = run_with_queue(test, max_batch=3).events
    assert [(event.images, len(event.queue_s)) for event in events] == [(1, 1), (3, 2), (2, 1)]
    assert [event.queued_images for event in events][1:] == [2, 0]
    assert all(event.compute_s > 0 for event in events)


def test_is_idle() -> None:
    async def test(queue: Queue) -> None:
        assert queue.batcher.is_idle
        first = await queue.submit_and_block(0)
        assert not queue.batcher.is_idle
        queue.model.unblock()
        await first
        assert queue.batcher.is_idle

    run_with_queue(test)


def test_close_finishes_the_running_batch_and_fails_queued_requests() -> None:
    async def test(queue: Queue) -> None:
        threads = [thread for thread in threading.enumerate() if thread.name == "model"]
        running, queued = await queue.submit_and_block(0), queue.submit(1)
        queue.batcher.close()
        with pytest.raises(BatcherClosed, match="the server is shutting down: try again"):
            await queued
        queue.model.unblock()
        assert numbers(await running) == [0]
        for thread in threads:
            await asyncio.to_thread(thread.join, 20)
            assert not thread.is_alive()

    assert run_with_queue(test).model.batches == [[0]]


def test_a_batch_within_the_inline_limit_runs_in_the_event_loop() -> None:
    """The time per image of the last batch decides whether the next one runs in the thread."""
    threads: list[str] = []

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        threads.append(threading.current_thread().name)
        time.sleep(0.05 * len(images))
        return images.astype(np.float32)

    async def test() -> None:
        batcher = Batcher(run, 4, 0.0, 100, lambda _: None, inline_limit_s=0.19)
        for count in (1, 1, 4, 1):
            result = await submit_to(batcher, np.full((count, 2), count))
            assert numbers(result) == [count] * count
        batcher.close()

    asyncio.run(test())
    loop = threading.current_thread().name
    assert threads == ["model", loop, "model", loop]


def test_the_batch_after_a_failure_does_not_run_in_the_event_loop() -> None:
    threads: list[str] = []

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        threads.append(threading.current_thread().name)
        if images[0, 0] == BAD:
            raise ModelFileError("cannot run", "export it again")
        return images.astype(np.float32)

    async def test() -> None:
        batcher = Batcher(run, 4, 0.0, 100, lambda _: None, inline_limit_s=10.0)
        for number in (0, BAD, 1, 2):
            await asyncio.gather(submit_to(batcher, np.full((2, 2), number)), return_exceptions=True)
        batcher.close()

    asyncio.run(test())
    loop = threading.current_thread().name
    assert threads == ["model", loop, "model", loop]


def test_a_request_that_fails_in_the_event_loop_fails_alone() -> None:
    async def test(queue: Queue) -> None:
        queue.batcher.close()
        batcher = Batcher(queue.model.run, 4, 0.0, 100, queue.events.append, inline_limit_s=10.0)
        queue.batcher = batcher
        assert numbers(await queue.submit(0)) == [0]
        results = await asyncio.gather(queue.submit(1), queue.submit(BAD), queue.submit(3), return_exceptions=True)
        assert results[1] is queue.model.error
        assert [numbers(result) for result in results if isinstance(result, InferenceResult)] == [[1], [3]]
        assert batcher.is_idle

    assert run_with_queue(test).model.batches == [[0], [1, BAD, 3], [1], [BAD], [3]]


def test_the_thread_ends_after_its_event_loop() -> None:
    model = Model()
    model.block()

    async def run() -> threading.Thread:
        before = set(threading.enumerate())
        batcher = Batcher(model.run, 1, 0.0, 1, lambda _: None)
        [thread] = set(threading.enumerate()) - before
        submit_to(batcher, np.zeros((1, 2)))
        await wait_until(lambda: bool(model.batches))
        return thread

    thread = asyncio.run(run())
    model.unblock()
    thread.join(20)
    assert not thread.is_alive()


requests = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([(1,), (2,), (2, 2)]), st.booleans()), min_size=1, max_size=12
)


@given(requests, st.integers(1, 6))
def test_every_request_gets_its_own_results(sizes: list[tuple[int, tuple[int, ...], bool]], max_batch: int) -> None:
    async def test(queue: Queue) -> None:
        futures, expected = [], []
        for start, (count, shape, pause) in enumerate(sizes):
            expected.append(list(range(100 * start, 100 * start + count)))
            futures.append(queue.submit(*expected[-1], shape=shape, dtype="i4"))
            if pause:
                await asyncio.sleep(0)
        assert [numbers(result) for result in await asyncio.gather(*futures)] == expected

    queue = run_with_queue(test, max_batch=max_batch)
    assert all(len(batch) <= max_batch for batch in queue.model.batches)
    assert sum(map(len, queue.model.batches)) == sum(count for count, _, _ in sizes)
