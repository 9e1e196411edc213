"""Apply a function to items ahead of their use, in threads. Results keep their order and memory is bounded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Final, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

_BATCHES_PER_THREAD: Final = 3
"""One that is being processed, one whose results are ready, and one that waits."""


def prefetch(executor: Executor, function: Callable[[In], Out], items: Iterable[In], max_pending: int) -> Iterator[Out]:
    """Yield `function(item)` for each item, in order, computed ahead by an executor.

    This is `Executor.map` with a bound. An exception from `function` is raised in place of its result.

    Args:
        executor: runs the function. It is not shut down.
        function: called from the executor's threads.
        items: consumed in the caller's thread. At most `max_pending + 1` items are taken ahead of the results.
        max_pending: the number of results that are computed or ready while the caller uses one.
    """
    pending: deque[Future[Out]] = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > max_pending:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def prefetch_batches(
    function: Callable[[list[In]], list[Out]], items: Iterable[In], threads: int, batch_size: int
) -> Iterator[Out]:
    """Yield the results of `function` for batches of items, in order, computed ahead in threads.

    At most `3 * threads + 1` batches are in memory. The threads end with the iterator. An exception from `function`
    ends the iteration.

    Args:
        function: returns one result per item of a batch. It is called from several threads at once.
        items: consumed in the caller's thread.
        threads: the number of threads.
        batch_size: the number of items that a thread processes at a time.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cifarx-prefetch")
    try:
        for results in prefetch(pool, function, batched(items, batch_size), _BATCHES_PER_THREAD * threads):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def batched(items: Iterable[In], size: int) -> Iterator[list[In]]:
    """Yield lists of `size` items; the last one may be shorter. This is `itertools.batched` of Python 3.12."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
