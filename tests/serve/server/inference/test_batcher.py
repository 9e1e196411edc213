import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cifarx_serve.errors import ModelFileError
from cifarx_serve.predictor import predictions
from cifarx_serve.server.errors import ClientDisconnect, RequestError
from cifarx_serve.server.inference.batcher import Answer, Batch, Batcher, Computed

BAD = 666


class Model:
    """Answers an image with its first number; on one of `BAD` it fails. It can be held."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.error: Exception = ModelFileError("does not run", "export it again")
        self._free = threading.Event()
        self._free.set()

    def hold(self) -> None:
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        first = images.reshape(len(images), -1)[:, :1]
        self.batches.append(first[:, 0].astype(int).tolist())
        self.shapes.append(images.shape)
        assert self._free.wait(30)
        if (first == BAD).any():
            raise self.error
        return first.astype(np.float32)


class Queue:
    """A batcher with such a model, and what it told."""

    def __init__(self, **limits: Any) -> None:
        self.model = Model()
        self.told: list[Batch] = []
        limits = {"max_batch": 4, "max_delay_s": 0.0, "max_queue": 100, "deadline_s": 30.0} | limits
        self.batcher = Batcher(self.model.run, told=self.told.append, **limits)

    def put(
        self, *numbers: int, shape: tuple[int, ...] = (2,), dtype: str = "f4", ago: float = 0.0, left: bool = False
    ) -> "asyncio.Future[Answer]":
        """Images, each all of one number, of a request that arrived so many seconds ago."""
        images = np.stack([np.full(shape, number, dtype) for number in numbers])
        return self.batcher.submit(images, time.perf_counter() - ago, lambda: left)

    async def busy(self, number: int = 0) -> "asyncio.Future[Answer]":
        """Have the model held, computing one image."""
        calls = len(self.model.batches)
        self.model.hold()
        answer = self.put(number)
        await until(lambda: len(self.model.batches) > calls)
        return answer


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


def numbers(answer: Answer) -> list[int]:
    return [int(number) for number in answer.logits[:, 0]]


def in_loop(test: Callable[[Queue], Awaitable[None]], **limits: Any) -> Queue:
    """Run a test with a queue in an event loop of its own."""

    async def run() -> Queue:
        queue = Queue(**limits)
        try:
            await test(queue)
        finally:
            queue.model.release()
            queue.batcher.close()
        return queue

    return asyncio.run(run())


def test_one_request_is_one_call() -> None:
    async def test(queue: Queue) -> None:
        answer = await queue.put(7, 8)
        assert numbers(answer) == [7, 8]
        assert answer.queued_s >= 0
        assert answer.computed_s >= 0

    queue = in_loop(test)
    assert queue.model.batches == [[7, 8]]


@given(st.integers(1, 12), st.integers(0, 3))
def test_a_request_is_told_the_classes_of_its_own_images(top_k: int, start: int) -> None:
    logits, names = np.random.default_rng(0).standard_normal((4, 12), np.float32), [f"class {n}" for n in range(12)]
    answer = Answer(Computed(logits), slice(start, 4), 0.0, 0.0)
    np.testing.assert_array_equal(answer.logits, logits[start:])
    for _ in range(2):
        assert answer.predictions(names, top_k) == predictions(logits[start:], names, top_k)


def test_an_idle_model_is_not_kept_waiting() -> None:
    """It is called with the one image that is there; what comes while it computes goes together after."""

    async def test(queue: Queue) -> None:
        first = await queue.busy(0)
        others = [queue.put(number) for number in (1, 2, 3)]
        await asyncio.sleep(0.02)
        assert queue.model.batches == [[0]]
        queue.model.release()
        assert [numbers(answer) for answer in await asyncio.gather(first, *others)] == [[0], [1], [2], [3]]

    assert in_loop(test).model.batches == [[0], [1, 2, 3]]


def test_what_comes_in_one_turn_of_the_loop_goes_together() -> None:
    async def test(queue: Queue) -> None:
        await asyncio.gather(queue.put(1), queue.put(2))

    assert in_loop(test).model.batches == [[1, 2]]


def test_no_more_than_the_largest_batch_goes_together() -> None:
    async def test(queue: Queue) -> None:
        answers = [await queue.busy(0), *(queue.put(number) for number in range(1, 8))]
        queue.model.release()
        assert [numbers(answer)[0] for answer in await asyncio.gather(*answers)] == list(range(8))

    assert in_loop(test, max_batch=3).model.batches == [[0], [1, 2, 3], [4, 5, 6], [7]]


def test_one_that_fits_goes_before_one_that_does_not() -> None:
    async def test(queue: Queue) -> None:
        answers = [await queue.busy(0), queue.put(1, 2), queue.put(3, 4), queue.put(5), queue.put(6)]
        queue.model.release()
        await asyncio.gather(*answers)

    assert in_loop(test, max_batch=3).model.batches == [[0], [1, 2, 5], [3, 4, 6]]


def test_a_request_larger_than_a_batch_is_run_in_parts() -> None:
    async def test(queue: Queue) -> None:
        assert numbers(await queue.put(*range(7))) == list(range(7))

    queue = in_loop(test, max_batch=3)
    assert queue.model.batches == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.images for batch in queue.told] == [7]


def test_different_shapes_and_types_never_mix() -> None:
    async def test(queue: Queue) -> None:
        answers = [
            await queue.busy(0),
            queue.put(1, shape=(2, 2)),
            queue.put(2, shape=(4,)),
            queue.put(3, shape=(2, 2)),
            queue.put(4, shape=(2, 2), dtype="u1"),
            queue.put(5, shape=(4,)),
        ]
        queue.model.release()
        assert [numbers(answer)[0] for answer in await asyncio.gather(*answers)] == list(range(6))

    queue = in_loop(test)
    assert queue.model.batches == [[0], [1, 3], [2, 5], [4]]
    assert queue.model.shapes == [(1, 2), (2, 2, 2), (2, 4), (1, 2, 2)]


def test_an_idle_model_waits_for_others_where_that_is_asked_for() -> None:
    async def test(queue: Queue) -> None:
        answers = [queue.put(1), queue.put(2)]
        await asyncio.sleep(0.05)
        assert queue.model.batches == []
        answers += [queue.put(3), queue.put(4)]
        await asyncio.gather(*answers)

    assert in_loop(test, max_delay_s=60.0, deadline_s=90.0).model.batches == [[1, 2, 3, 4]]


@pytest.mark.parametrize("delay", [0.0003, 0.01], ids=["polled", "timed"])
def test_the_wait_for_others_ends(delay: float) -> None:
    async def test(queue: Queue) -> None:
        arrived = time.perf_counter()
        await queue.put(1)
        assert time.perf_counter() - arrived >= delay

    assert in_loop(test, max_delay_s=delay).model.batches == [[1]]


def test_the_wait_for_others_counts_from_the_arrival() -> None:
    async def test(queue: Queue) -> None:
        await queue.put(1, ago=61)

    in_loop(test, max_delay_s=60.0, deadline_s=90.0)


def test_a_full_queue_refuses() -> None:
    async def test(queue: Queue) -> None:
        answers = [await queue.busy(0), queue.put(1, 2), queue.put(3)]
        with pytest.raises(RequestError, match=r"3 images are waiting, and 3 may: try again in a second") as refused:
            queue.put(4)
        assert refused.value.status == HTTPStatus.SERVICE_UNAVAILABLE
        queue.model.release()
        await asyncio.gather(*answers)
        assert numbers(await queue.put(5)) == [5]

    assert in_loop(test, max_queue=3).model.batches == [[0], [1, 2, 3], [5]]


def test_a_request_larger_than_the_queue_is_taken_where_nothing_waits() -> None:
    async def test(queue: Queue) -> None:
        first, large = await queue.busy(0), queue.put(*range(1, 6))
        queue.model.release()
        await first
        assert numbers(await large) == [1, 2, 3, 4, 5]

    in_loop(test, max_queue=3)


def test_past_the_deadline_there_is_an_error_and_no_work() -> None:
    async def test(queue: Queue) -> None:
        computing, waiting = await queue.busy(0), queue.put(1)
        for answer in (computing, waiting):
            with pytest.raises(RequestError, match=r"no answer within 0\.2 s") as late:
                await answer
            assert late.value.status == HTTPStatus.GATEWAY_TIMEOUT
        queue.model.release()
        assert numbers(await queue.put(2)) == [2]

    assert in_loop(test, deadline_s=0.2).model.batches == [[0], [2]]


def test_what_is_late_or_left_makes_room_in_the_queue() -> None:
    async def test(queue: Queue) -> None:
        answers = [await queue.busy(0), queue.put(1, 2, left=True), queue.put(3, ago=29.9)]
        await asyncio.sleep(0.2)
        queue.model.release()
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert [type(answer) for answer in found] == [Answer, ClientDisconnect, RequestError]
        await until(lambda: queue.batcher.idle)
        again = [await queue.busy(4), queue.put(5, 6, 7)]
        queue.model.release()
        await asyncio.gather(*again)

    queue = in_loop(test, max_queue=3)
    assert queue.told[-1].left == 0


def test_past_the_deadline_there_is_room_for_others() -> None:
    """While the model still computes."""

    async def test(queue: Queue) -> None:
        computing, waiting = await queue.busy(0), queue.put(1, 1, ago=29.9)
        with pytest.raises(RequestError, match="2 images are waiting, and 2 may"):
            queue.put(2)
        with pytest.raises(RequestError, match="no answer within 30 s"):
            await waiting
        other = queue.put(2, 2)
        queue.model.release()
        assert [numbers(answer) for answer in await asyncio.gather(computing, other)] == [[0], [2, 2]]

    assert in_loop(test, max_queue=2).model.batches == [[0], [2, 2]]


def test_the_deadline_counts_from_the_arrival() -> None:
    async def test(queue: Queue) -> None:
        first = await queue.busy(0)
        with pytest.raises(RequestError, match="no answer within 30 s"):
            await queue.put(1, ago=31)
        queue.model.release()
        await first

    assert in_loop(test).model.batches == [[0]]


def test_what_nobody_waits_for_is_not_computed() -> None:
    async def test(queue: Queue) -> None:
        first, left, stays, cancelled = await queue.busy(0), queue.put(1, left=True), queue.put(2), queue.put(3)
        cancelled.cancel()
        queue.model.release()
        assert numbers(await stays) == [2]
        await first
        with pytest.raises(ClientDisconnect):
            await left

    assert in_loop(test).model.batches == [[0], [2]]


def test_where_everybody_left_the_model_is_not_called() -> None:
    async def test(queue: Queue) -> None:
        with pytest.raises(ClientDisconnect):
            await queue.put(1, left=True)
        assert queue.batcher.idle
        assert numbers(await queue.put(2)) == [2]

    assert in_loop(test).model.batches == [[2]]


@pytest.mark.parametrize("error", [ModelFileError("does not run", "export it again"), ZeroDivisionError("a defect")])
def test_one_requests_images_do_not_fail_the_others(error: Exception) -> None:
    async def test(queue: Queue) -> None:
        queue.model.error = error
        answers = [await queue.busy(0), queue.put(1), queue.put(2, BAD), queue.put(3)]
        queue.model.release()
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert found[2] is error
        assert [numbers(answer) for answer in found if isinstance(answer, Answer)] == [[0], [1], [3]]
        assert numbers(await queue.put(4)) == [4]

    assert in_loop(test).model.batches == [[0], [1, 2, BAD, 3], [1], [2, BAD], [3], [4]]


def test_every_call_is_told() -> None:
    async def test(queue: Queue) -> None:
        answers = [await queue.busy(0), queue.put(1), queue.put(2, 3), queue.put(4, 5)]
        queue.model.release()
        await asyncio.gather(*answers)

    told = in_loop(test, max_batch=3).told
    assert [(batch.images, len(batch.queued_s)) for batch in told] == [(1, 1), (3, 2), (2, 1)]
    assert [batch.left for batch in told][1:] == [2, 0]
    assert all(batch.computed_s > 0 for batch in told)


def test_it_is_idle_when_nothing_waits_and_nothing_is_computed() -> None:
    async def test(queue: Queue) -> None:
        assert queue.batcher.idle
        first = await queue.busy(0)
        assert not queue.batcher.idle
        queue.model.release()
        await first
        assert queue.batcher.idle

    in_loop(test)


def test_closing_ends_what_is_computed_and_refuses_what_waits() -> None:
    async def test(queue: Queue) -> None:
        threads = [thread for thread in threading.enumerate() if thread.name == "model"]
        computing, waiting = await queue.busy(0), queue.put(1)
        queue.batcher.close()
        with pytest.raises(RequestError, match="the server ends: try again") as refused:
            await waiting
        assert refused.value.status == HTTPStatus.SERVICE_UNAVAILABLE
        queue.model.release()
        assert numbers(await computing) == [0]
        for thread in threads:
            await asyncio.to_thread(thread.join, 20)
            assert not thread.is_alive()

    assert in_loop(test).model.batches == [[0]]


def test_a_model_that_was_quick_is_called_in_the_event_loop() -> None:
    """By what the last call took for an image: a batch that should take too long for the others goes to the thread."""
    called: list[str] = []

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        called.append(threading.current_thread().name)
        time.sleep(0.05 * len(images))
        return images.astype(np.float32)

    async def ask() -> None:
        batcher = Batcher(run, 4, 0.0, 100, 30.0, lambda _: None, at_once_s=0.19)
        for count in (1, 1, 4, 1):
            answer = await batcher.submit(np.full((count, 2), count), time.perf_counter(), lambda: False)
            assert numbers(answer) == [count] * count
        batcher.close()

    asyncio.run(ask())
    loop = threading.current_thread().name
    assert called == ["model", loop, "model", loop]


def test_a_failure_is_not_taken_for_a_quick_model() -> None:
    called: list[str] = []

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        called.append(threading.current_thread().name)
        if images[0, 0] == BAD:
            raise ModelFileError("does not run", "export it again")
        return images.astype(np.float32)

    async def ask() -> None:
        batcher = Batcher(run, 4, 0.0, 100, 30.0, lambda _: None, at_once_s=10.0)
        for number in (0, BAD, 1, 2):
            answer = batcher.submit(np.full((2, 2), number), time.perf_counter(), lambda: False)
            await asyncio.gather(answer, return_exceptions=True)
        batcher.close()

    asyncio.run(ask())
    loop = threading.current_thread().name
    assert called == ["model", loop, "model", loop]


def test_what_fails_in_the_event_loop_fails_alone() -> None:
    async def test(queue: Queue) -> None:
        queue.batcher.close()
        batcher = Batcher(queue.model.run, 4, 0.0, 100, 30.0, queue.told.append, at_once_s=10.0)
        queue.batcher = batcher
        assert numbers(await queue.put(0)) == [0]
        found = await asyncio.gather(queue.put(1), queue.put(BAD), queue.put(3), return_exceptions=True)
        assert found[1] is queue.model.error
        assert [numbers(answer) for answer in found if isinstance(answer, Answer)] == [[1], [3]]
        assert batcher.idle

    assert in_loop(test).model.batches == [[0], [1, BAD, 3], [1], [BAD], [3]]


def test_its_thread_ends_with_its_loop() -> None:
    model = Model()
    model.hold()

    async def run() -> threading.Thread:
        before = set(threading.enumerate())
        batcher = Batcher(model.run, 1, 0.0, 1, 30.0, lambda _: None)
        [thread] = set(threading.enumerate()) - before
        batcher.submit(np.zeros((1, 2)), time.perf_counter(), lambda: False)
        await until(lambda: bool(model.batches))
        return thread

    thread = asyncio.run(run())
    model.release()
    thread.join(20)
    assert not thread.is_alive()


asked = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([(1,), (2,), (2, 2)]), st.booleans()), min_size=1, max_size=12
)


@given(asked, st.integers(1, 6))
def test_everybody_gets_their_own_answers(sizes: list[tuple[int, tuple[int, ...], bool]], max_batch: int) -> None:
    async def test(queue: Queue) -> None:
        answers, expected = [], []
        for start, (count, shape, pause) in enumerate(sizes):
            expected.append(list(range(100 * start, 100 * start + count)))
            answers.append(queue.put(*expected[-1], shape=shape, dtype="i4"))
            if pause:
                await asyncio.sleep(0)
        assert [numbers(answer) for answer in await asyncio.gather(*answers)] == expected

    queue = in_loop(test, max_batch=max_batch)
    assert all(len(batch) <= max_batch for batch in queue.model.batches)
    assert sum(map(len, queue.model.batches)) == sum(count for count, _, _ in sizes)
