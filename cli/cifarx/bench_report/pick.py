"""`cifarx bench --pick "p99<2ms"`: of the measured rows the one with the most throughput inside the bounds."""

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
    """What can be bounded: its value in a row, its units, and whether less of it is better."""

    value: Callable[[BenchmarkRow], float | None]
    units: dict[str, float]
    less_is_better: bool


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
    """One condition: `quantity` by its name, and `limit` in microseconds, bytes or as a share."""

    text: str
    quantity: str
    comparison: str
    limit: float

    def holds(self, row: BenchmarkRow) -> bool:
        """Whether a row keeps it; one that has no such figure does not."""
        value = _QUANTITIES[self.quantity].value(row)
        return value is not None and _COMPARISONS[self.comparison](value, self.limit)


def parse_bounds(text: str) -> tuple[Bound, ...]:
    """Read bounds with commas between, such as `p99<2ms, accuracy>=57%`.

    Raises:
        UsageError: one of them cannot be read, has no such unit, or bounds the wrong side.
    """
    return tuple(_parse_bound(part) for part in text.split(","))


def pick(rows: Sequence[BenchmarkRow], bounds: Sequence[Bound]) -> BenchmarkRow | None:
    """The row with the most images a second of those that keep every bound; None where none does."""
    keeping = [row for row in rows if all(bound.holds(row) for bound in bounds)]
    return max(keeping, key=lambda row: row.images_per_s, default=None)


def picked_line(row: BenchmarkRow) -> str:
    """What was picked, in words."""
    return (
        f"pick: {row.file} by {row.backend} on {row.provider} at batch {row.batch}: {row.images_per_s:,.0f} images/s, "
        f"p99 {row.p99_us:,.0f} µs" + ("" if row.stable else ", not stable")
    )


def nothing_line(rows: Sequence[BenchmarkRow], bounds: Sequence[Bound]) -> str:
    """Why nothing was picked: the best figure there is for each bound that no row keeps, or that none keeps all."""
    reasons = []
    for bound in bounds:
        if not any(bound.holds(row) for row in rows):
            reasons.append(f"no row keeps {bound.text} ({_nearest(rows, bound.quantity)})")
    together = " and ".join(bound.text for bound in bounds)
    return "pick: " + ("; ".join(reasons) or f"no row keeps {together} together")


def _parse_bound(part: str) -> Bound:
    found = _BOUND.fullmatch(part.lower())
    if found is None or found[1] not in _QUANTITIES:
        raise UsageError(f"bound {part.strip()!r}", f"give {', '.join(_QUANTITIES)} and a limit: {EXAMPLE}")
    name, comparison, number, unit = found.groups()
    quantity = _QUANTITIES[name]
    if unit not in quantity.units:
        known = " or ".join(unit or "a share of 1" for unit in quantity.units)
        raise UsageError(f"bound {part.strip()!r}", f"give {name} in {known}")
    if (comparison[0] == "<") != quantity.less_is_better:
        side = "above" if comparison[0] == ">" else "below"
        raise UsageError(f"bound {part.strip()!r} keeps what is {side}", f"turn the {comparison} around")
    limit = float(number) * quantity.units[unit]
    if quantity.units is _SHARES and limit > 1:
        raise UsageError(f"bound {part.strip()!r} is more than all images", f"give a share, or {number}%")
    return Bound(part.strip(), name, comparison, limit)


def _nearest(rows: Sequence[BenchmarkRow], name: str) -> str:
    quantity = _QUANTITIES[name]
    found = [(value, row) for row in rows if (value := quantity.value(row)) is not None]
    if not found:
        return f"there is no {name}: the data has no labels"
    best, row = (min if quantity.less_is_better else max)(found, key=lambda pair: pair[0])
    return f"the best is {_written(best, quantity.units)}, {row.file} at batch {row.batch}"


def _written(value: float, units: dict[str, float]) -> str:
    if units is _SHARES:
        return f"{value:.2%}"
    return f"{value:,.0f} µs" if units is _TIMES else f"{value / 1e6:,.1f} MB"
