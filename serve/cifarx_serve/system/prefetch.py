"""Work done ahead, in threads: in order, and no further ahead than memory should hold."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Final, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

_CHUNKS_A_THREAD: Final = 3
"""One that is worked on, one that is ready, one that waits."""


def ahead(work: Callable[[list[In]], list[Out]], items: Iterable[In], threads: int, chunk: int) -> Iterator[Out]:
    """The results of `work`, chunk for chunk, computed in threads.

    At most `3 * threads + 1` chunks are in memory, so that many items are taken before their results are asked for.
    What `work` raises ends it.

    Args:
        work: gives a result an item; called from several threads at once.
        items: taken from one thread, the caller's.
        threads: how many.
        chunk: how many items a thread takes at a time.
    """
    remaining = iter(items)
    waiting: deque[Future[list[Out]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cifarx-ahead")
    try:
        while part := list(islice(remaining, chunk)):
            waiting.append(pool.submit(work, part))
            if len(waiting) > _CHUNKS_A_THREAD * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
