from typing import Final

import pytest

from cifarx_serve.benchmarking.bounds import (
    BYTES,
    POINTS,
    SHARES,
    TIMES,
    Bound,
    Quantity,
    all_hold,
    explain_unmet,
    format_value,
    parse_bounds,
)
from cifarx_serve.errors import UsageError

_QUANTITIES: Final = {
    "p99": Quantity[dict[str, float]](lambda row: row.get("p99"), TIMES, True),
    "size": Quantity[dict[str, float]](lambda row: row.get("size"), BYTES, True),
    "accuracy": Quantity[dict[str, float]](lambda row: row.get("accuracy"), SHARES, False),
    "accuracy_drop": Quantity[dict[str, float]](lambda row: row.get("accuracy_drop"), POINTS, True),
}


def _parse(text: str) -> tuple[Bound[dict[str, float]], ...]:
    return parse_bounds(text, _QUANTITIES, '"p99<2ms"')


@pytest.mark.parametrize("text", ["accuracy_drop<=0.5", "accuracy_drop <= 0.5%", "ACCURACY_DROP<=.5"])
def test_a_number_without_a_unit_is_in_percentage_points_where_the_quantity_is(text: str) -> None:
    [bound] = _parse(text)
    assert bound.limit == pytest.approx(0.005)
    assert bound.holds({"accuracy_drop": 0.0049})
    assert not bound.holds({"accuracy_drop": 0.0051})


def test_a_row_must_meet_every_bound() -> None:
    bounds = _parse("p99<2ms, accuracy_drop<=1")
    assert all_hold(bounds, {"p99": 1999.0, "accuracy_drop": 0.01})
    assert not all_hold(bounds, {"p99": 2000.0, "accuracy_drop": 0.0})
    assert not all_hold(bounds, {"p99": 10.0})


def test_explains_each_bound_that_no_row_meets_with_the_nearest_value() -> None:
    rows = [{"p99": 3000.0, "accuracy_drop": 0.02, "size": 5e6}, {"p99": 2500.0, "accuracy_drop": 0.03, "size": 5e6}]
    reasons = explain_unmet(rows, _parse("p99<2ms, accuracy_drop<=1, size<9MB"), lambda row: f"row of {row['p99']:.0f}")
    assert reasons == (
        "no row meets p99<2ms (the best is 2,500 µs, row of 2500); "
        "no row meets accuracy_drop<=1 (the best is 2.00 points, row of 3000)"
    )


def test_a_wrong_unit_names_the_right_ones() -> None:
    with pytest.raises(UsageError, match="give accuracy_drop in % or percentage points"):
        _parse("accuracy_drop<5ms")


def test_formats_values_with_their_units() -> None:
    found = [format_value(*pair) for pair in ((1500.4, TIMES), (2.5e6, BYTES), (0.5, SHARES), (0.0075, POINTS))]
    assert found == ["1,500 µs", "2.5 MB", "50.00%", "0.75 points"]
