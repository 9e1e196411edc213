"""Dynamic batching: requests that arrive while the model is busy are run as one batch.

An idle model runs at once (unless `max_delay_s` makes it wait for more requests), so the batch size follows the load:
one image when there is only one, up to `max_batch` when enough are queued.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import ImageError
from cifarx_serve.predictor import Prediction, top_predictions
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.errors import BatcherClosed, QueueFull, RequestCancelled
from cifarx_serve.spec import ModelSpec

RunModel: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
"""Maps a batch of images to the output of the model; called by one thread at a time."""

_MAX_SHARED_TOP_K: Final = 10
"""Up to this `top_k`, the predictions of a whole batch are computed once and shared by its requests."""

_STOP: Final = None

_EXPIRY_INTERVAL_S: Final = 0.01
"""How late a deadline may be noticed: checking all requests now and then is cheaper than one timer per request."""

_TIMER_RESOLUTION_S: Final = 1e-3
"""How late a timer of the event loop can fire; shorter delays are polled."""


class BatchOutput:
    """The output of one call of the model, shared by all requests of the batch.

    Args:
        values: logits or probabilities as the spec of the model says, float32 (N, output_size).
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values
        self._predictions: dict[int, list[Prediction | ImageError]] = {}

    def top_predictions(self, spec: ModelSpec, top_k: int) -> list[Prediction | ImageError]:
        """Return the predictions of all N images, cached per `top_k`: ten images cost about as much as one."""
        if top_k not in self._predictions:
            self._predictions[top_k] = top_predictions(self.values, spec, top_k)
        return self._predictions[top_k]


class InferenceResult(NamedTuple):
    """The result of one request.

    Attributes:
        output: the output of the batch that the request was part of.
        rows: the rows of the batch that belong to the request.
        queue_s: how long the request was queued, in seconds.
        compute_s: how long the model took for the batch, in seconds.
        started_at: when the model began with the batch, on the clock of `time.perf_counter`.
    """

    output: BatchOutput
    rows: slice
    queue_s: float
    compute_s: float
    started_at: float

    @property
    def values(self) -> NDArray[np.float32]:
        """The output of the model for the request's images, float32 (N, output_size)."""
        return self.output.values[self.rows]

    def top_predictions(self, spec: ModelSpec, top_k: int) -> list[Prediction | ImageError]:
        """Return one prediction per image of the request, with its `top_k` best classes."""
        if top_k > _MAX_SHARED_TOP_K:  # otherwise each request could make the server rank the whole batch again
            return top_predictions(self.values, spec, top_k)
        return self.output.top_predictions(spec, top_k)[self.rows]


class BatchEvent(NamedTuple):
    """What `on_batch` is called with after each call of the model.

    Attributes:
        images: the images of the batch.
        queued_images: the images still queued when the call ended.
        queue_s: how long each request of the batch was queued, in seconds.
        compute_s: how long the call took, in seconds.
        failed: the requests of the batch that got no result: the model failed, or they had ended before.
        outputs: what the model returned, (N, output_size): one array, or one per request if the whole batch failed.
    """

    images: int
    queued_images: int
    queue_s: tuple[float, ...]
    compute_s: float
    failed: int
    outputs: list[NDArray[np.float32]]


class _PendingRequest:
    """A request whose future has no result yet."""

    __slots__ = ("deadline", "future", "images", "is_disconnected", "queued_at")

    def __init__(
        self,
        images: NDArray[Any],
        future: "asyncio.Future[InferenceResult]",
        deadline: Deadline,
        is_disconnected: Callable[[], bool],
    ) -> None:
        self.images = images
        self.future = future
        self.deadline = deadline
        self.is_disconnected = is_disconnected
        self.queued_at = time.perf_counter()

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


_Outcome: TypeAlias = "tuple[BatchOutput, slice] | Exception"


class _CompletedBatch(NamedTuple):
    """The requests of one batch with an output or an error for each."""

    requests: list[_PendingRequest]
    outcomes: list[_Outcome]
    started_at: float
    ended_at: float


class Batcher:
    """The queue of one model. Create, use and close it in one event loop; the model runs in a thread of its own.

    Args:
        run: the model.
        max_batch: the maximum number of images per call; a request with more is split into several calls.
        max_delay_s: how long an idle model waits for more images to fill its batch, in seconds.
        max_queue: the maximum number of images in the queue.
        on_batch: called in the event loop after each call of the model.
        inline_limit_s: a batch that should take less than this, judging by the time per image of the last one, runs in
            the event loop itself: handing it to the thread and back costs a fifteenth of a small request's time. Use
            it only for models that take about the same time for every image.
    """

    def __init__(
        self,
        run: RunModel,
        max_batch: int,
        max_delay_s: float,
        max_queue: int,
        on_batch: Callable[[BatchEvent], None],
        inline_limit_s: float = 0.0,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._max_queue = max_queue
        self._on_batch = on_batch
        self._inline_limit_s = inline_limit_s
        self._seconds_per_image = math.inf
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_PendingRequest] = deque()
        self._queued_images = 0
        self._busy = False
        self._busy_since = 0.0
        self._pending: list[_PendingRequest] = []
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._next_start: asyncio.Handle | None = None
        self._batches: SimpleQueue[list[_PendingRequest] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def require_capacity(self, count: int) -> None:
        """Raise QueueFull if `count` more images do not fit into the queue; an empty queue takes any number."""
        if self._queued_images and self._queued_images + count > self._max_queue:
            problem = f"the queue is full, with {self._queued_images} images of at most {self._max_queue}"
            raise QueueFull(problem, "try again in a second")

    def submit(
        self, images: NDArray[Any], deadline: Deadline, is_disconnected: Callable[[], bool]
    ) -> "asyncio.Future[InferenceResult]":
        """Queue the images of one request.

        Args:
            images: (N, ...), N at least 1; only images of the same shape and dtype are batched together.
            deadline: when the request must be answered; `max_delay_s` counts from its start.
            is_disconnected: returns whether the client has disconnected; called before the images are run.

        Returns:
            A future for the result. It raises DeadlineExceeded, RequestCancelled if the client has disconnected,
            BatcherClosed, or the error of the model.

        Raises:
            QueueFull: the queue has no capacity for the images.
        """
        self.require_capacity(len(images))
        request = _PendingRequest(images, self._loop.create_future(), deadline, is_disconnected)
        self._pending.append(request)
        if self._expiry_timer is None:
            self._expire()
        self._queue.append(request)
        self._queued_images += len(images)
        if self._next_start is not None and self._queued_images >= self._max_batch:
            self._next_start.cancel()  # it may be a timer that waits for more images
            self._next_start = None
        self._schedule()
        return request.future

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued and the model is not running."""
        return not (self._busy or self._queue)

    def running_s(self) -> float:
        """Return for how long the model has been running the current batch, in seconds; 0 if it is not running."""
        return time.perf_counter() - self._busy_since if self._busy else 0.0

    def close(self) -> None:
        """Fail the queued requests with BatcherClosed, and stop the thread after the batch it is running."""
        for request in self._queue:
            request.fail(BatcherClosed("the server is shutting down", "try again"))
        self._queue.clear()
        self._queued_images = 0
        self._batches.put(_STOP)

    def _schedule(self) -> None:
        """Start a batch in the next iteration of the event loop, with everything that is queued by then."""
        if self._queue and not self._busy and self._next_start is None:
            self._next_start = self._loop.call_soon(self._start_batch)

    def _start_batch(self) -> None:
        self._next_start = None
        if self._busy or not self._queue:
            return
        delay_s = self._queue[0].deadline.started_at + self._max_delay_s - time.perf_counter()
        if delay_s > 0 and self._queued_images < self._max_batch:
            self._next_start = self._start_after(delay_s)
        elif batch := self._take_batch():
            self._busy, self._busy_since = True, time.perf_counter()
            if self._seconds_per_image * _count_images(batch) < self._inline_limit_s:
                self._finish(self._run_batch(batch))
            else:
                self._batches.put(batch)

    def _start_after(self, delay_s: float) -> asyncio.Handle:
        timer_s = delay_s - _TIMER_RESOLUTION_S
        if timer_s > 0:
            return self._loop.call_later(timer_s, self._start_batch)
        return self._loop.call_soon(self._start_batch)

    def _take_batch(self) -> list[_PendingRequest]:
        """Remove the next batch from the queue: the first request and those after it that fit.

        Requests whose client has disconnected are dropped.
        """
        batch: list[_PendingRequest] = []
        skipped: deque[_PendingRequest] = deque()
        images = 0
        while self._queue and images < self._max_batch:
            request = self._queue.popleft()
            if request.future.done() or request.is_disconnected():
                self._queued_images -= len(request.images)
                request.fail(RequestCancelled())
            elif batch and not (_can_stack(request, batch[0]) and images + len(request.images) <= self._max_batch):
                skipped.append(request)
            else:
                batch.append(request)
                images += len(request.images)
        self._queue.extendleft(reversed(skipped))
        self._queued_images -= images
        return batch

    def _work(self) -> None:
        """Run batches in the thread until the batcher or the event loop is closed."""
        while batch := self._batches.get():
            completed = self._run_batch(batch)
            try:
                self._loop.call_soon_threadsafe(self._finish, completed)
            except RuntimeError:  # the event loop is closed: nobody awaits the results
                return

    def _run_batch(self, batch: list[_PendingRequest]) -> _CompletedBatch:
        started_at = time.perf_counter()
        outcomes = self._outcomes(batch)
        return _CompletedBatch(batch, outcomes, started_at, time.perf_counter())

    def _outcomes(self, batch: list[_PendingRequest]) -> list[_Outcome]:
        """Run a batch in one call; if that fails, one call per request, so that no request can fail another."""
        try:
            images = batch[0].images if len(batch) == 1 else np.concatenate([request.images for request in batch])
            output = BatchOutput(self._run_split(images))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [outcome for request in batch for outcome in self._outcomes([request])]
        outcomes: list[_Outcome] = []
        start = 0
        for request in batch:
            end = start + len(request.images)
            outcomes.append((output, slice(start, end)))
            start = end
        return outcomes

    def _run_split(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Run the images in calls of at most `max_batch`."""
        size = self._max_batch
        if len(images) <= size:
            return self._run(images)
        return np.concatenate([self._run(images[start : start + size]) for start in range(0, len(images), size)])

    def _finish(self, completed: _CompletedBatch) -> None:
        self._busy = False
        self._schedule()  # first, so that the thread runs the next batch while the responses of this one are written
        compute_s = completed.ended_at - completed.started_at
        queue_s = []
        outputs: list[NDArray[np.float32]] = []
        unanswered = 0
        for request, outcome in zip(completed.requests, completed.outcomes, strict=True):
            waited_s = completed.started_at - request.queued_at
            queue_s.append(waited_s)
            if not isinstance(outcome, Exception) and not outcome[1].start:  # the first request of an output
                outputs.append(outcome[0].values)
            if request.future.done():
                unanswered += 1
            elif isinstance(outcome, Exception):
                unanswered += 1
                request.fail(outcome)
            else:
                request.future.set_result(InferenceResult(*outcome, waited_s, compute_s, completed.started_at))
        images = _count_images(completed.requests)
        failed = any(isinstance(outcome, Exception) for outcome in completed.outcomes)
        self._seconds_per_image = math.inf if failed else compute_s / images  # a failure may end long before a run
        self._on_batch(BatchEvent(images, self._queued_images, tuple(queue_s), compute_s, unanswered, outputs))

    def _expire(self) -> None:
        """Fail the requests whose deadline has passed and remove them from the queue; repeat while any is pending."""
        self._pending = [request for request in self._pending if not request.future.done()]
        now = time.perf_counter()
        for request in self._pending:
            if request.deadline.expires_at <= now:
                request.fail(request.deadline.exceeded())
        self._queue = deque(request for request in self._queue if not request.future.done())
        self._queued_images = _count_images(self._queue)
        self._expiry_timer = None
        if self._pending:
            shortest_s = min(request.deadline.timeout_s for request in self._pending)
            interval_s = max(_TIMER_RESOLUTION_S, min(_EXPIRY_INTERVAL_S, shortest_s / 10))
            self._expiry_timer = self._loop.call_later(interval_s, self._expire)


def _count_images(requests: Iterable[_PendingRequest]) -> int:
    return sum(len(request.images) for request in requests)


def _can_stack(one: _PendingRequest, other: _PendingRequest) -> bool:
    return one.images.dtype == other.images.dtype and one.images.shape[1:] == other.images.shape[1:]
