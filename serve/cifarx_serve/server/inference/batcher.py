"""Requests that wait for a model, put together: what queued while it was busy goes through it at once.

An idle model is never kept waiting (but for `max_delay_us`, where that was asked for), so a batch is as large as the
load makes it: one image where there is no other, `max_batch` where there are enough.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.predictor import Prediction, predictions
from cifarx_serve.server.errors import ClientDisconnect, RequestError

Run: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
"""From a batch of images to its logits; called by one thread at a time."""


class Computed:
    """What one call of the model gave, for the images of all its requests: logits, (N, classes)."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.logits = logits
        self._predictions: dict[int, list[Prediction]] = {}

    def predictions(self, class_names: Sequence[str], top_k: int) -> list[Prediction]:
        """Of all images, made once for each `top_k`: it takes about as long for one image as for ten."""
        if top_k not in self._predictions:
            self._predictions[top_k] = predictions(self.logits, class_names, top_k)
        return self._predictions[top_k]


class Answer(NamedTuple):
    """The images of one request, `rows` of a call of the model, and what they took: seconds."""

    computed: Computed
    rows: slice
    queued_s: float
    computed_s: float

    @property
    def logits(self) -> NDArray[np.float32]:
        """(N, classes)."""
        return self.computed.logits[self.rows]

    def predictions(self, class_names: Sequence[str], top_k: int) -> list[Prediction]:
        """One for each image."""
        if top_k > _SHARED_TOP_K:  # else each of many requests could ask for another number of all images' classes
            return predictions(self.logits, class_names, top_k)
        return self.computed.predictions(class_names, top_k)[self.rows]


class Batch(NamedTuple):
    """What one call of the model took: its images, seconds, and the images that wait at its end."""

    images: int
    left: int
    queued_s: tuple[float, ...]
    computed_s: float


class _Waiting:
    """The images of one request, (N, ...), and who waits for them."""

    __slots__ = ("answer", "arrived", "images", "is_disconnected", "queued")

    def __init__(
        self,
        images: NDArray[Any],
        answer: "asyncio.Future[Answer]",
        is_disconnected: Callable[[], bool],
        arrived: float,
    ) -> None:
        self.images = images
        self.answer = answer
        self.is_disconnected = is_disconnected
        self.arrived = arrived
        self.queued = time.perf_counter()


_Result: TypeAlias = "tuple[Computed, slice] | Exception"


class _Done(NamedTuple):
    """What the model made of some requests: rows of logits or an error for each."""

    requests: list[_Waiting]
    results: list[_Result]
    started: float
    ended: float


_SHARED_TOP_K: Final = 10
"""So many classes of every image are made for all requests of a batch; more for a request alone."""

_END: Final = None

_LOOK_S: Final = 0.01
"""How late a deadline may be: a look at all requests now and then costs less than a timer for each."""

_TIMER_S: Final = 1e-3
"""What an event loop's timers may be late: shorter waits are polled."""


class Batcher:
    """One model's queue. Made, asked and closed in an event loop; the model runs in a thread, or there if it is quick.

    Args:
        run: the model.
        max_batch: images of one call; a request with more is run in parts.
        max_delay_s: how long the first image of a batch waits for others where the model is idle.
        max_queue: images that may wait.
        deadline_s: of a request.
        told: hears of every call of the model.
        at_once_s: a call that should take less, by what the last one took for an image, is made in the event loop: the
            way to a thread and back is a fifteenth of a small request's time. For models that take about as long for
            every image.
    """

    def __init__(
        self,
        run: Run,
        max_batch: int,
        max_delay_s: float,
        max_queue: int,
        deadline_s: float,
        told: Callable[[Batch], None],
        at_once_s: float = 0.0,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._max_queue = max_queue
        self._deadline_s = deadline_s
        self._told = told
        self._at_once_s = at_once_s
        self._image_s = math.inf
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting] = deque()
        self._queued_images = 0
        self._busy = False
        self._unanswered: list[_Waiting] = []
        self._looking: asyncio.TimerHandle | None = None
        self._start: asyncio.Handle | None = None
        self._work: SimpleQueue[list[_Waiting] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._compute, name="model", daemon=True)
        self._thread.start()

    def require_room(self, count: int) -> None:
        """Raises RequestError (503) where so many images may not wait too; an empty queue takes any number."""
        if self._queued_images and self._queued_images + count > self._max_queue:
            problem = f"{self._queued_images} images are waiting, and {self._max_queue} may"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, problem, "try again in a second")

    def submit(
        self, images: NDArray[Any], arrived: float, is_disconnected: Callable[[], bool]
    ) -> "asyncio.Future[Answer]":
        """Queue the images of one request.

        Args:
            images: (N, ...), N at least 1; those of one shape and dtype go together.
            arrived: when the request did, by `time.perf_counter`: its deadline and its delay count from there.
            is_disconnected: asked before the images are computed: whether nobody waits for them any more.

        Raises:
            RequestError: the queue is full (503). From the future also: the deadline has passed (504), the client has
                left (ClientDisconnect), or what the model raised.
        """
        self.require_room(len(images))
        waiting = _Waiting(images, self._loop.create_future(), is_disconnected, arrived)
        self._unanswered.append(waiting)
        if self._looking is None:
            self._look()
        self._queue.append(waiting)
        self._queued_images += len(images)
        if self._start is not None and self._queued_images >= self._max_batch:
            self._start.cancel()  # it may have been put off, for others to come
            self._start = None
        self._schedule()
        return waiting.answer

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is computed."""
        return not (self._busy or self._queue)

    def close(self) -> None:
        """End the thread once it has done what it was given; what still waits is answered with 503."""
        for waiting in self._queue:
            self._fail(waiting, RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the server ends", "try again"))
        self._queue.clear()
        self._queued_images = 0
        self._work.put(_END)

    def _schedule(self) -> None:
        """Start a batch once what has arrived by now is queued."""
        if self._queue and not self._busy and self._start is None:
            self._start = self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._start = None
        if self._busy or not self._queue:
            return
        wait_s = self._queue[0].arrived + self._max_delay_s - time.perf_counter()
        if wait_s > 0 and self._queued_images < self._max_batch:
            late = wait_s - _TIMER_S
            self._start = self._loop.call_later(late, self._begin) if late > 0 else self._loop.call_soon(self._begin)
        elif batch := self._take():
            self._busy = True
            if self._image_s * _images(batch) < self._at_once_s:
                self._finish(self._done(batch))
            else:
                self._work.put(batch)

    def _take(self) -> list[_Waiting]:
        """The next batch: the first that waits, and those after it that fit; those whose client left are dropped."""
        taken: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        images = 0
        while self._queue and images < self._max_batch:
            waiting = self._queue.popleft()
            if waiting.answer.done() or waiting.is_disconnected():
                self._drop(waiting)
            elif taken and not (_alike(waiting, taken[0]) and images + len(waiting.images) <= self._max_batch):
                others.append(waiting)
            else:
                taken.append(waiting)
                images += len(waiting.images)
        self._queue.extendleft(reversed(others))
        self._queued_images -= images
        return taken

    def _drop(self, waiting: _Waiting) -> None:
        self._queued_images -= len(waiting.images)
        self._fail(waiting, ClientDisconnect())

    def _compute(self) -> None:
        """The thread: one batch after the other."""
        while batch := self._work.get():
            done = self._done(batch)
            try:
                self._loop.call_soon_threadsafe(self._finish, done)
            except RuntimeError:  # the loop is closed: nobody waits
                return

    def _done(self, batch: list[_Waiting]) -> _Done:
        started = time.perf_counter()
        results = self._results(batch)
        return _Done(batch, results, started, time.perf_counter())

    def _results(self, batch: list[_Waiting]) -> list[_Result]:
        """One call for all; where it fails one for each, so that one request's images cannot fail another's."""
        try:
            images = batch[0].images if len(batch) == 1 else np.concatenate([waiting.images for waiting in batch])
            computed = Computed(self._logits(images))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [result for waiting in batch for result in self._results([waiting])]
        results: list[_Result] = []
        start = 0
        for waiting in batch:
            end = start + len(waiting.images)
            results.append((computed, slice(start, end)))
            start = end
        return results

    def _logits(self, images: NDArray[Any]) -> NDArray[np.float32]:
        size = self._max_batch
        if len(images) <= size:
            return self._run(images)
        return np.concatenate([self._run(images[start : start + size]) for start in range(0, len(images), size)])

    def _finish(self, done: _Done) -> None:
        self._busy = False
        self._schedule()  # before the answers: the thread computes the next batch while this one's are written
        computed_s = done.ended - done.started
        queued = []
        for waiting, result in zip(done.requests, done.results, strict=True):
            queued_s = done.started - waiting.queued
            queued.append(queued_s)
            if isinstance(result, Exception):
                self._fail(waiting, result)
            elif not waiting.answer.done():
                waiting.answer.set_result(Answer(*result, queued_s, computed_s))
        images = _images(done.requests)
        failed = any(isinstance(result, Exception) for result in done.results)
        self._image_s = math.inf if failed else computed_s / images  # a failure tells nothing of how long a call takes
        self._told(Batch(images, self._queued_images, tuple(queued), computed_s))

    def _look(self) -> None:
        """Fail those whose deadline has passed, and make room in the queue; again and again, until all are answered."""
        self._unanswered = [waiting for waiting in self._unanswered if not waiting.answer.done()]
        late = time.perf_counter() - self._deadline_s
        for waiting in self._unanswered:
            if waiting.arrived <= late:
                problem = f"no answer within {self._deadline_s:g} s"
                error = RequestError(HTTPStatus.GATEWAY_TIMEOUT, problem, "try again when there is less load")
                self._fail(waiting, error)
        self._queue = deque(waiting for waiting in self._queue if not waiting.answer.done())
        self._queued_images = _images(self._queue)
        pause_s = max(_TIMER_S, min(_LOOK_S, self._deadline_s / 10))
        self._looking = self._loop.call_later(pause_s, self._look) if self._unanswered else None

    @staticmethod
    def _fail(waiting: _Waiting, error: Exception) -> None:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)


def _images(requests: Iterable[_Waiting]) -> int:
    return sum(len(waiting.images) for waiting in requests)


def _alike(one: _Waiting, other: _Waiting) -> bool:
    return one.images.dtype == other.images.dtype and one.images.shape[1:] == other.images.shape[1:]
