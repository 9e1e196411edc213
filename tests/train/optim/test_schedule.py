import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_train.optim.schedule import lr_factor
from cifarx_train.recipes import Recipe, recipe

shares = st.floats(0, 1, exclude_max=True)
schedules = st.sampled_from(["constant", "linear", "cosine"])


def plan(**values: Any) -> Recipe:
    return recipe("notes", overrides=values)


def factors(chosen: Recipe, steps: int) -> list[float]:
    return [lr_factor(chosen, step, steps) for step in range(steps)]


@given(schedule=schedules, warm_up=shares, steps=st.integers(1, 400))
def test_every_step_trains_at_a_share_of_the_peak(schedule: str, warm_up: float, steps: int) -> None:
    assert all(0 < factor <= 1 for factor in factors(plan(schedule=schedule, warm_up=warm_up), steps))


@given(schedule=schedules, warm_up=shares, steps=st.integers(1, 10**7))
def test_the_last_step_of_a_long_run_still_trains(schedule: str, warm_up: float, steps: int) -> None:
    assert 0 < lr_factor(plan(schedule=schedule, warm_up=warm_up), steps - 1, steps) <= 1


@given(schedule=schedules, warm_up=shares, steps=st.integers(2, 400))
def test_it_rises_then_never_rises_again(schedule: str, warm_up: float, steps: int) -> None:
    rising = round(warm_up * steps)
    values = factors(plan(schedule=schedule, warm_up=warm_up), steps)
    assert all(before < after for before, after in pairwise(values[:rising]))
    falling = values[rising:]
    if schedule == "constant":
        assert set(falling) <= {1.0}
    else:
        assert all(before > after for before, after in pairwise(falling))
    assert max(values) == 1.0  # the peak is reached, by the last step of the warm-up or the first after it


@given(steps=st.integers(1, 400))
def test_constant_without_a_warm_up_is_the_peak(steps: int) -> None:
    assert factors(plan(), steps) == [1.0] * steps


def test_linear_falls_by_equal_parts() -> None:
    assert factors(plan(schedule="linear"), 4) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_a_cosine() -> None:
    expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert factors(plan(schedule="cosine"), 8) == pytest.approx(expected)
    assert expected[4] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_warm_up_is_a_line_and_its_share_of_the_steps(schedule: str) -> None:
    values = factors(plan(schedule=schedule, warm_up=0.4), 10)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:] == factors(plan(schedule=schedule), 6)
