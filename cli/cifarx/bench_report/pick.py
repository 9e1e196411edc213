"""Picks the row with the highest throughput within bounds, for `cifarx bench --pick "p99<2ms"`."""

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from cifarx_serve.benchmarking import bounds as grammar
from cifarx_serve.benchmarking.benchmark import BenchmarkRow
from cifarx_serve.benchmarking.bounds import BYTES, SHARES, TIMES, Quantity, all_hold, explain_unmet

EXAMPLE: Final = '"p99<2ms", "p99<2ms, accuracy>=57%", "memory<200MB"'

Bound: TypeAlias = grammar.Bound[BenchmarkRow]

_QUANTITIES: Final[Mapping[str, Quantity[BenchmarkRow]]] = {
    "p50": Quantity(lambda row: row.p50_us, TIMES, True),
    "p90": Quantity(lambda row: row.p90_us, TIMES, True),
    "p99": Quantity(lambda row: row.p99_us, TIMES, True),
    "size": Quantity(lambda row: row.size_bytes, BYTES, True),
    "memory": Quantity(lambda row: row.peak_bytes, BYTES, True),
    "accuracy": Quantity(lambda row: row.accuracy, SHARES, False),
    "agreement": Quantity(lambda row: row.agreement, SHARES, False),
}


def parse_bounds(text: str) -> tuple[Bound, ...]:
    """Parse comma-separated bounds, such as `p99<2ms, accuracy>=57%`.

    Raises:
        UsageError: a bound cannot be parsed, has a wrong unit, or points in the wrong direction.
    """
    return grammar.parse_bounds(text, _QUANTITIES, EXAMPLE)


def pick(rows: Sequence[BenchmarkRow], bounds: Sequence[Bound]) -> BenchmarkRow | None:
    """Return the row with the most images per second among those that meet every bound, or None if none does."""
    matching = [row for row in rows if all_hold(bounds, row)]
    return max(matching, key=lambda row: row.images_per_s, default=None)


def describe_pick(row: BenchmarkRow) -> str:
    """Return a line about the picked row."""
    return (
        f"pick: {row.file} by {row.backend} on {row.provider} at batch {row.batch}: {row.images_per_s:,.0f} images/s, "
        f"p99 {row.p99_us:,.0f} µs" + ("" if row.stable else ", not stable")
    )


def explain_no_pick(rows: Sequence[BenchmarkRow], bounds: Sequence[Bound]) -> str:
    """Return a line that says why no row was picked: each bound that no row meets, with the best measured value."""
    return f"pick: {explain_unmet(rows, bounds, lambda row: f'{row.file} at batch {row.batch}')}"
