"""Skipping the int8 candidates that a runtime cannot run."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from cifarx_serve.errors import UsageError
from cifarx_serve.progress import Progress

T = TypeVar("T")


def skip_refused(attempts: Iterable[Callable[[], T]], refusal: type[UsageError], progress: Progress) -> Iterator[T]:
    """Yield the results of the attempts that are not refused.

    Args:
        attempts: called one after the other, as the results are asked for.
        refusal: what an attempt raises for a candidate that the runtime cannot run.
        progress: called with the reason of each refusal.

    Raises:
        UsageError: the last refusal, if every attempt is refused.
    """
    last: UsageError | None = None
    found = False
    for attempt in attempts:
        try:
            result = attempt()
        except refusal as error:
            progress(f"int8: {error.problem}")
            last = error
            continue
        found = True
        yield result
    if last is not None and not found:
        raise last
