"""The layout of the error histogram."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_export.parity.error_analysis import error_histogram
from cifarx_export.parity.histogram import HEIGHT, WIDTH, HistogramLayout, layout_histogram


def layout(errors: list[float], atol: float | None = None) -> HistogramLayout:
    reference = np.zeros((1, len(errors)), np.float32)
    return layout_histogram(error_histogram(reference, np.array([errors], np.float32)), atol)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=60),
    st.none() | st.floats(min_value=0, max_value=1e30),
)
def test_everything_is_inside_the_box(errors: list[float], atol: float | None) -> None:
    drawn = layout(errors, atol)
    assert drawn.x_ticks
    for bar in drawn.bars:
        assert bar.width > 0
        assert bar.height > 0
        assert bar.x >= 0
        assert bar.x + bar.width <= WIDTH
        assert bar.y >= 0
        assert bar.y + bar.height == pytest.approx(drawn.baseline)
    for tick in drawn.x_ticks:
        assert drawn.left - 1e-6 <= tick.position <= drawn.right + 1e-6
    for tick in drawn.y_ticks:
        assert 0 <= tick.position <= HEIGHT
    if drawn.tolerance is not None:
        assert drawn.left - 1e-6 <= drawn.tolerance <= drawn.right + 1e-6


def test_bars_are_in_order_and_errors_above_the_tolerance_are_marked() -> None:
    drawn = layout([0, 2e-6, 2e-6, 3e-3], atol=1e-4)
    none, small, large = drawn.bars
    assert drawn.tolerance is not None
    assert none.x < drawn.left < small.x < drawn.tolerance < large.x
    assert [bar.outside for bar in drawn.bars] == [False, False, True]
    assert none.height == large.height < small.height
    assert small.title.startswith("2 logits: 1.8e-06 to 3.2e-06")


@pytest.mark.parametrize("atol", [None, 0.0])
def test_without_a_tolerance_nothing_is_outside(atol: float | None) -> None:
    drawn = layout([1e-6, 1.0], atol)
    assert drawn.tolerance is None
    assert not any(bar.outside for bar in drawn.bars)


def test_ticks_of_the_counts_are_powers_of_ten() -> None:
    drawn = layout([1e-3] * 12_000)
    assert [tick.label for tick in drawn.y_ticks] == ["1", "10", "100", "1k", "10k", "100k"]
