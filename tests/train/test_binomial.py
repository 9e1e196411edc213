"""Exact binomial statistics, compared with sums of fractions and with the closed forms that exist."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_train.binomial import floor_percent, interval, lower_bound, upper_tail


@st.composite
def results(draw: st.DrawFn) -> tuple[int, int]:
    trials = draw(st.integers(1, 60))
    return draw(st.integers(0, trials)), trials


@given(results(), st.integers(0, 100))
def test_the_tail_is_the_sum_of_the_probabilities(result: tuple[int, int], percent: int) -> None:
    successes, trials = result
    share = Fraction(percent, 100)
    terms = [math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes, trials + 1)]
    assert upper_tail(successes, trials, percent / 100) == pytest.approx(float(sum(terms)), abs=1e-12)


@given(results())
def test_the_bound_is_the_share_at_which_the_result_becomes_unlikely(result: tuple[int, int]) -> None:
    successes, trials = result
    bound = lower_bound(successes, trials)
    assert 0 <= bound <= successes / trials
    if successes:
        assert upper_tail(successes, trials, bound) == pytest.approx(0.05, abs=1e-9)
    else:
        assert bound == 0


@given(results())
def test_the_interval_contains_the_share_and_is_symmetric(result: tuple[int, int]) -> None:
    successes, trials = result
    low, high = interval(successes, trials)
    assert low <= successes / trials <= high
    mirrored = interval(trials - successes, trials)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high))


@pytest.mark.parametrize("trials", [1, 1000, 10_000, 1_000_000])
def test_a_perfect_result_has_the_bound_of_the_rule_of_three(trials: int) -> None:
    """All trials succeed with probability share ** trials."""
    assert lower_bound(trials, trials) == pytest.approx(0.05 ** (1 / trials), abs=1e-12)


def test_the_interval_of_a_published_table() -> None:
    """Clopper and Pearson, 10 trials with 5 successes."""
    assert interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)


def test_a_bound_is_rounded_down() -> None:
    assert floor_percent(0.99999) == "99.99%"
    assert floor_percent(1.0) == "100.00%"
