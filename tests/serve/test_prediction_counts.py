"""Counts of predictions, and how far two distributions of them are apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from cifarx_serve.prediction_counts import SCORE_BOUNDS, count_predictions, population_stability_index
from cifarx_serve.scores import class_scores, predicted_classes
from tests.support.spec_model import make_spec

SPEC = make_spec()
LABELS = make_spec(activation="sigmoid", thresholds=(0.5, 0.5, 0.9))

counts = arrays.arrays(np.float64, 5, elements=st.integers(0, 1000)).filter(lambda values: values.sum() > 0)


@given(arrays.arrays(np.float32, st.tuples(st.integers(0, 9), st.just(3)), elements=st.floats(-30, 30, width=32)))
def test_classes_and_scores_are_those_of_the_predictions(outputs: NDArray[np.float32]) -> None:
    counted = count_predictions(outputs, SPEC)
    best = class_scores(outputs, SPEC).max(axis=1)
    assert counted.images == len(outputs)
    assert counted.classes.tolist() == np.bincount(predicted_classes(outputs, SPEC), minlength=3).tolist()
    assert counted.scores.sum() == len(outputs)
    assert counted.score_sum == pytest.approx(best.sum())
    for bound, at_most in zip(SCORE_BOUNDS, counted.scores.cumsum(), strict=True):
        assert at_most == (np.minimum(best, 1) <= bound).sum()


def test_all_labels_that_apply_are_counted() -> None:
    outputs = np.array([[5, 5, 1], [-5, -5, 5], [-5, -5, -5]], np.float32)
    counted = count_predictions(outputs, LABELS)
    assert counted.classes.tolist() == [1, 1, 1]
    assert counted.scores.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_outputs_that_are_not_finite_are_left_out() -> None:
    outputs = np.array([[np.nan, 1, 2], [np.inf, 0, 0], [1, 0, 0]], np.float32)
    assert count_predictions(outputs, SPEC).classes.tolist() == [1, 0, 0]


def test_the_index_of_a_published_example() -> None:
    """Two bins that change from half each to 60 % and 40 %: 0.1 ln 1.2 - 0.1 ln 0.8."""
    expected, found = np.array([50.0, 50.0]), np.array([60.0, 40.0])
    assert population_stability_index(expected, found) == pytest.approx(0.1 * np.log(1.5))


@given(counts, counts, st.floats(0.01, 100))
def test_the_index_is_symmetric_and_zero_only_without_a_change(
    one: NDArray[np.float64], other: NDArray[np.float64], scale: float
) -> None:
    index = population_stability_index(one, other)
    assert np.isfinite(index)
    assert index == pytest.approx(population_stability_index(other, one))
    assert population_stability_index(one, one * scale) == pytest.approx(0, abs=1e-9)
    assert index >= -1e-9
