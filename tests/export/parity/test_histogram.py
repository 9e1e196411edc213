"""The histogram as shapes to draw."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_export.parity.error_analysis import error_histogram
from cifarx_export.parity.histogram import HEIGHT, WIDTH, HistogramChart, histogram_chart


def chart(errors: list[float], atol: float | None = None) -> HistogramChart:
    reference = np.zeros((1, len(errors)), np.float32)
    return histogram_chart(error_histogram(reference, np.array([errors], np.float32)), atol)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=60),
    st.none() | st.floats(min_value=0, max_value=1e30),
)
def test_everything_is_inside_the_box(errors: list[float], atol: float | None) -> None:
    drawn = chart(errors, atol)
    assert drawn.exponents
    for bar in drawn.bars:
        assert bar.width > 0
        assert bar.height > 0
        assert bar.x >= 0
        assert bar.x + bar.width <= WIDTH
        assert bar.y >= 0
        assert bar.y + bar.height == pytest.approx(drawn.baseline)
    for mark in drawn.exponents:
        assert drawn.left - 1e-6 <= mark.place <= drawn.right + 1e-6
    for mark in drawn.counts:
        assert 0 <= mark.place <= HEIGHT
    if drawn.gate is not None:
        assert drawn.left - 1e-6 <= drawn.gate <= drawn.right + 1e-6


def test_bars_are_in_order_and_what_is_larger_than_the_tolerance_is_marked() -> None:
    drawn = chart([0, 2e-6, 2e-6, 3e-3], atol=1e-4)
    none, small, large = drawn.bars
    assert none.x < drawn.left < small.x < drawn.gate < large.x
    assert [bar.outside for bar in drawn.bars] == [False, False, True]
    assert none.height == large.height < small.height
    assert small.title.startswith("2 logits: 1.8e-06 to 3.2e-06")


@pytest.mark.parametrize("atol", [None, 0.0])
def test_without_a_tolerance_nothing_is_outside(atol: float | None) -> None:
    drawn = chart([1e-6, 1.0], atol)
    assert drawn.gate is None
    assert not any(bar.outside for bar in drawn.bars)


def test_counts_are_marked_in_powers_of_ten() -> None:
    drawn = chart([1e-3] * 12_000)
    assert [mark.text for mark in drawn.counts] == ["1", "10", "100", "1k", "10k", "100k"]
