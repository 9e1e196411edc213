import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarx_serve.system.prefetch import batched, prefetch, prefetch_batches


def each(function: Callable[[int], int]) -> Callable[[list[int]], list[int]]:
    return lambda batch: [function(item) for item in batch]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.integers(1, 4), st.integers(1, 30))
def test_results_are_those_of_map(items: int, threads: int, batch_size: int) -> None:
    expected = [item**2 for item in range(items)]
    assert list(prefetch_batches(each(lambda item: item * item), range(items), threads, batch_size)) == expected
    with ThreadPoolExecutor(threads) as pool:
        assert list(prefetch(pool, lambda item: item * item, range(items), batch_size)) == expected


def test_slow_items_keep_their_place() -> None:
    def work(item: int) -> int:
        time.sleep(0.02 if item % 7 == 0 else 0)
        return item

    assert list(prefetch_batches(each(work), range(50), 3, 2)) == list(range(50))


def counted(taken: list[int]) -> Iterator[int]:
    """Yield numbers without end; `taken` lists those that were consumed."""
    for number in count():
        taken.append(number)
        yield number


def test_the_number_of_batches_in_memory_is_bounded() -> None:
    taken: list[int] = []
    results = prefetch_batches(each(abs), counted(taken), 2, 5)
    for received in range(1, 101):
        next(results)
        assert len(taken) - received <= 5 * (3 * 2 + 1)
    close(results)


@pytest.mark.parametrize("max_pending", [1, 4])
def test_the_number_of_pending_items_is_bounded(max_pending: int) -> None:
    taken: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        results = prefetch(pool, abs, counted(taken), max_pending)
        for received in range(1, 101):
            next(results)
            assert len(taken) - received == max_pending


def test_several_threads_work_at_once() -> None:
    together = threading.Barrier(3, timeout=20)
    assert len(list(prefetch_batches(each(lambda _: together.wait()), range(3), 3, 1))) == 3


def test_an_exception_ends_the_iteration_and_the_threads() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(prefetch_batches(each(lambda item: 1 // (item - 5)), range(1000), 2, 2))
    assert threading.active_count() == before


def test_closing_the_iterator_ends_the_threads() -> None:
    before = threading.active_count()
    results = prefetch_batches(each(abs), range(1000), 2, 2)
    assert next(results) == 0
    close(results)
    assert threading.active_count() == before


def close(results: Iterator[int]) -> None:
    assert isinstance(results, Generator)
    results.close()


def test_batches_have_the_given_size_but_for_the_last() -> None:
    assert list(batched(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batched([], 3)) == []
