import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarx_serve.system.prefetch import ahead


def each(work: Callable[[int], int]) -> Callable[[list[int]], list[int]]:
    return lambda part: [work(item) for item in part]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.integers(1, 4), st.integers(1, 30))
def test_it_is_map(count: int, threads: int, chunk: int) -> None:
    assert list(ahead(each(lambda item: item * item), range(count), threads, chunk)) == [
        item**2 for item in range(count)
    ]


def test_slow_items_keep_their_place() -> None:
    def work(item: int) -> int:
        time.sleep(0.02 if item % 7 == 0 else 0)
        return item

    assert list(ahead(each(work), range(50), 3, 2)) == list(range(50))


def test_it_takes_few_items_more_than_it_gave() -> None:
    """However many there are."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = ahead(each(abs), items(), 2, 5)
    for given_back in range(1, 101):
        next(results)
        assert taken - given_back <= 5 * (3 * 2 + 1)
    results.close()  # type: ignore[attr-defined]


def test_several_threads_work_at_once() -> None:
    together = threading.Barrier(3, timeout=20)
    assert len(list(ahead(each(lambda _: together.wait()), range(3), 3, 1))) == 3


def test_an_error_ends_it_and_its_threads() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(ahead(each(lambda item: 1 // (item - 5)), range(1000), 2, 2))
    assert threading.active_count() == before


def test_who_stops_asking_leaves_no_threads() -> None:
    before = threading.active_count()
    results = ahead(each(abs), range(1000), 2, 2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
