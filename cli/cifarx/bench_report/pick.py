"""Picks the row with the highest throughput within bounds, for `cifarx bench --pick "p99<2ms"`."""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from cifarx_serve.benchmarking.benchmark import BenchmarkRow
from cifarx_serve.errors import UsageError

EXAMPLE: Final = '"p99<2ms", "p99<2ms, accuracy>=57%", "memory<200MB"'

_TIMES: Final = {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6}
_BYTES: Final = {"kb": 1e3, "mb": 1e6, "gb": 1e9}
_SHARES: Final = {"%": 0.01, "": 1.0}


class _Quantity(NamedTuple):
    """A quantity that can be bounded: how to read it from a row, its units, and whether lower is better."""

    value: Callable[[BenchmarkRow], float | None]
    units: dict[str, float]
    lower_is_better: bool


_QUANTITIES: Final[dict[str, _Quantity]] = {
    "p50": _Quantity(lambda row: row.p50_us, _TIMES, True),
    "p90": _Quantity(lambda row: row.p90_us, _TIMES, True),
    "p99": _Quantity(lambda row: row.p99_us, _TIMES, True),
    "size": _Quantity(lambda row: row.size_bytes, _BYTES, True),
    "memory": _Quantity(lambda row: row.peak_bytes, _BYTES, True),
    "accuracy": _Quantity(lambda row: row.accuracy, _SHARES, False),
    "agreement": _Quantity(lambda row: row.agreement, _SHARES, False),
}

_COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_BOUND: Final = re.compile(r"\s*([a-z0-9]+)\s*(<=|>=|<|>)\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zµ%]*)\s*", re.ASCII)


class Bound(NamedTuple):
    """One condition on a row; `quantity` is a name such as p99, `limit` is in microseconds, bytes or a fraction."""

    text: str
    quantity: str
    comparison: str
    limit: float

    def holds(self, row: BenchmarkRow) -> bool:
        """Return whether a row meets the bound; a row without a value for the quantity does not."""
        value = _QUANTITIES[self.quantity].value(row)
        return value is not None and _COMPARISONS[self.comparison](value, self.limit)


def parse_bounds(text: str) -> tuple[Bound, ...]:
    """Parse comma-separated bounds, such as `p99<2ms, accuracy>=57%`.

    Raises:
        UsageError: a bound cannot be parsed, has a wrong unit, or points in the wrong direction.
    """
    return tuple(_parse_bound(part) for part in text.split(","))


def pick(rows: Sequence[BenchmarkRow], bounds: Sequence[Bound]) -> BenchmarkRow | None:
    """Return the row with the most images per second among those that meet every bound, or None if none does."""
    matching = [row for row in rows if all(bound.holds(row) for bound in bounds)]
    return max(matching, key=lambda row: row.images_per_s, default=None)


def describe_pick(row: BenchmarkRow) -> str:
    """Return a line about the picked row."""
    return (
        f"pick: {row.file} by {row.backend} on {row.provider} at batch {row.batch}: {row.images_per_s:,.0f} images/s, "
        f"p99 {row.p99_us:,.0f} µs" + ("" if row.stable else ", not stable")
    )


def explain_no_pick(rows: Sequence[BenchmarkRow], bounds: Sequence[Bound]) -> str:
    """Return a line that says why no row was picked: each bound that no row meets, with the best measured value."""
    reasons = []
    for bound in bounds:
        if not any(bound.holds(row) for row in rows):
            reasons.append(f"no row meets {bound.text} ({_best_value(rows, bound.quantity)})")
    together = " and ".join(bound.text for bound in bounds)
    return "pick: " + ("; ".join(reasons) or f"no row meets {together} together")


def _parse_bound(part: str) -> Bound:
    match = _BOUND.fullmatch(part.lower())
    if match is None or match[1] not in _QUANTITIES:
        raise UsageError(
            f"cannot parse bound {part.strip()!r}", f"use {', '.join(_QUANTITIES)} with a limit: {EXAMPLE}"
        )
    name, comparison, number, unit = match.groups()
    quantity = _QUANTITIES[name]
    if unit not in quantity.units:
        known = " or ".join(unit or "a fraction of 1" for unit in quantity.units)
        raise UsageError(f"bound {part.strip()!r} has a wrong unit", f"give {name} in {known}")
    if (comparison[0] == "<") != quantity.lower_is_better:
        side = "higher" if comparison[0] == ">" else "lower"
        raise UsageError(f"bound {part.strip()!r} asks for {side} values, which are worse", f"reverse the {comparison}")
    limit = float(number) * quantity.units[unit]
    if quantity.units is _SHARES and limit > 1:
        raise UsageError(f"bound {part.strip()!r} is more than 100 %", f"give a fraction up to 1, or {number}%")
    return Bound(part.strip(), name, comparison, limit)


def _best_value(rows: Sequence[BenchmarkRow], name: str) -> str:
    quantity = _QUANTITIES[name]
    values = [(value, row) for row in rows if (value := quantity.value(row)) is not None]
    if not values:
        return f"there is no {name}: the data has no labels"
    best, row = (min if quantity.lower_is_better else max)(values, key=lambda pair: pair[0])
    return f"the best is {_format_value(best, quantity.units)}, {row.file} at batch {row.batch}"


def _format_value(value: float, units: dict[str, float]) -> str:
    if units is _SHARES:
        return f"{value:.2%}"
    return f"{value:,.0f} µs" if units is _TIMES else f"{value / 1e6:,.1f} MB"
