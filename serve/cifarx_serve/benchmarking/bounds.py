"""Bounds on measured quantities, such as `p99<2ms, accuracy>=57%`: their grammar, and what they say about rows."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from cifarx_serve.errors import UsageError

Row = TypeVar("Row")
Units: TypeAlias = Mapping[str, float]
"""By the name of a unit: what a number of it is multiplied by. The empty name is that of a number without a unit."""

TIMES: Final[Units] = {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6}
BYTES: Final[Units] = {"kb": 1e3, "mb": 1e6, "gb": 1e9}
SHARES: Final[Units] = {"%": 0.01, "": 1.0}
POINTS: Final[Units] = {"%": 0.01, "": 0.01}
"""Units of times in microseconds, of sizes in bytes, of shares as fractions, and of percentage points as fractions."""

_COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_BOUND: Final = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=|<|>)\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zµ%]*)\s*", re.ASCII)


class Quantity(NamedTuple, Generic[Row]):
    """A quantity that can be bounded.

    Attributes:
        value: reads it from a row; None if the row does not have it.
        units: its units.
        lower_is_better: whether a bound limits it from above.
    """

    value: Callable[[Row], float | None]
    units: Units
    lower_is_better: bool


class Bound(NamedTuple, Generic[Row]):
    """One condition on a row.

    Attributes:
        text: the condition as it was written.
        name: the name of the quantity, such as p99.
        quantity: the quantity.
        comparison: `<`, `<=`, `>` or `>=`.
        limit: in microseconds, bytes or a fraction.
    """

    text: str
    name: str
    quantity: Quantity[Row]
    comparison: str
    limit: float

    def holds(self, row: Row) -> bool:
        """Return whether a row meets the bound; a row without a value for the quantity does not."""
        value = self.quantity.value(row)
        return value is not None and self.allows(value)

    def allows(self, value: float) -> bool:
        """Return whether a value of the quantity meets the bound."""
        return _COMPARISONS[self.comparison](value, self.limit)


def parse_bounds(text: str, quantities: Mapping[str, Quantity[Row]], example: str) -> tuple[Bound[Row], ...]:
    """Parse comma-separated bounds, such as `p99<2ms, accuracy>=57%`.

    Args:
        text: the bounds.
        quantities: the quantities that can be bounded, by name.
        example: valid bounds, for error messages.

    Raises:
        UsageError: a bound cannot be parsed, has a wrong unit, or points in the wrong direction.
    """
    return tuple(_parse_bound(part, quantities, example) for part in text.split(","))


def all_hold(bounds: Sequence[Bound[Row]], row: Row) -> bool:
    """Return whether a row meets every bound."""
    return all(bound.holds(row) for bound in bounds)


def explain_unmet(rows: Sequence[Row], bounds: Sequence[Bound[Row]], name: Callable[[Row], str]) -> str:
    """Return why no row meets all bounds: each bound that none meets, with the best measured value.

    Args:
        rows: the rows.
        bounds: the bounds.
        name: returns what a row is called.
    """
    reasons = []
    for bound in bounds:
        if not any(bound.holds(row) for row in rows):
            reasons.append(f"no row meets {bound.text} ({_best_value(rows, bound, name)})")
    together = " and ".join(bound.text for bound in bounds)
    return "; ".join(reasons) or f"no row meets {together} together"


def format_value(value: float, units: Units) -> str:
    """Return a value of a quantity with these units as text, such as `1,500 µs`."""
    if units is SHARES:
        return f"{value:.2%}"
    if units is POINTS:
        return f"{100 * value:.2f} points"
    return f"{value:,.0f} µs" if units is TIMES else f"{value / 1e6:,.1f} MB"


def _parse_bound(part: str, quantities: Mapping[str, Quantity[Row]], example: str) -> Bound[Row]:
    match = _BOUND.fullmatch(part.lower())
    if match is None or match[1] not in quantities:
        raise UsageError(f"cannot parse bound {part.strip()!r}", f"use {', '.join(quantities)} with a limit: {example}")
    name, comparison, number, unit = match.groups()
    quantity = quantities[name]
    if unit not in quantity.units:
        known = " or ".join(unit or _plain_number(quantity.units) for unit in quantity.units)
        raise UsageError(f"bound {part.strip()!r} has a wrong unit", f"give {name} in {known}")
    if (comparison[0] == "<") != quantity.lower_is_better:
        side = "higher" if comparison[0] == ">" else "lower"
        raise UsageError(f"bound {part.strip()!r} asks for {side} values, which are worse", f"reverse the {comparison}")
    limit = float(number) * quantity.units[unit]
    if quantity.units is SHARES and limit > 1:
        raise UsageError(f"bound {part.strip()!r} is more than 100 %", f"give a fraction up to 1, or {number}%")
    return Bound(part.strip(), name, quantity, comparison, limit)


def _plain_number(units: Units) -> str:
    return "percentage points" if units is POINTS else "a fraction of 1"


def _best_value(rows: Sequence[Row], bound: Bound[Row], name: Callable[[Row], str]) -> str:
    quantity = bound.quantity
    values = [(value, row) for row in rows if (value := quantity.value(row)) is not None]
    if not values:
        return f"there is no {bound.name}: the data has no labels"
    best, row = (min if quantity.lower_is_better else max)(values, key=lambda pair: pair[0])
    return f"the best is {format_value(best, quantity.units)}, {name(row)}"
