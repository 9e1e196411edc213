"""The requirement of a search, such as `accuracy_drop<=0.5, p99<2ms`: bounds that its pick must meet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from cifarx_export.optimization.results import CandidateResult, Measurement
from cifarx_serve.benchmarking import bounds
from cifarx_serve.benchmarking.bounds import BYTES, POINTS, SHARES, TIMES, Quantity, all_hold

EXAMPLE: Final = '"accuracy_drop<=0.5", "accuracy_drop<=0.5, p99<2ms", "size<1MB"'

Requirement: TypeAlias = Sequence[bounds.Bound[CandidateResult]]


def _measured(value: Callable[[Measurement], float]) -> Callable[[CandidateResult], float | None]:
    return lambda result: None if result.measurement is None else value(result.measurement)


_QUANTITIES: Final[Mapping[str, Quantity[CandidateResult]]] = {
    "p50": Quantity(_measured(lambda found: found.latency.p50_us), TIMES, True),
    "p99": Quantity(_measured(lambda found: found.latency.p99_us), TIMES, True),
    "size": Quantity(lambda result: result.size_bytes, BYTES, True),
    "memory": Quantity(_measured(lambda found: found.peak_bytes), BYTES, True),
    "accuracy": Quantity(lambda result: result.accuracy, SHARES, False),
    "accuracy_drop": Quantity(lambda result: result.accuracy_drop, POINTS, True),
    "agreement": Quantity(lambda result: result.agreement, SHARES, False),
}
"""Latencies are of one image. The accuracy drop is in percentage points."""


def parse_requirement(text: str) -> Requirement:
    """Parse bounds separated by commas; no text is no bound.

    Raises:
        UsageError: a bound is not valid, see `cifarx_serve.benchmarking.bounds.parse_bounds`.
    """
    return bounds.parse_bounds(text, _QUANTITIES, EXAMPLE) if text.strip() else ()


def meets(requirement: Requirement, result: CandidateResult) -> bool:
    """Return whether a candidate was measured and meets every bound."""
    return result.is_measured and all_hold(requirement, result)


def explain_no_pick(results: Sequence[CandidateResult], requirement: Requirement) -> str:
    """Return why no candidate was picked, with the nearest value of each bound that none meets."""
    measured = [result for result in results if result.is_measured]
    if not measured:
        return "no candidate was measured"
    return bounds.explain_unmet(measured, requirement, lambda result: result.name).replace("no row", "no candidate")
