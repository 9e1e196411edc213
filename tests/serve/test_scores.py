from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from cifarx_serve.scores import applicable_labels, class_scores, predicted_classes, sigmoid, softmax
from cifarx_serve.spec import InputSpec, ModelSpec

SOFTMAX = ModelSpec(model="any", class_names=("a", "b", "c"), input=InputSpec(height=4, width=4))
LABELS = msgspec.structs.replace(SOFTMAX, activation="sigmoid")
BINARY = msgspec.structs.replace(LABELS, class_names=("no", "yes"), outputs=1)

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
logit_batches = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.floats(-50, 50, width=32) | finite
)


@given(logit_batches)
@example(np.array([[3e38, -3e38, 0]], np.float32))
@example(np.zeros((2, 10), np.float32))
def test_scores_sum_to_one(logits: NDArray[np.float32]) -> None:
    scores = softmax(logits)
    assert scores.shape == logits.shape
    assert scores.dtype == np.float64
    assert ((scores >= 0) & (scores <= 1)).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-12)


@given(logit_batches)
def test_a_larger_logit_never_has_a_smaller_score(logits: NDArray[np.float32]) -> None:
    for row, scores in zip(logits, softmax(logits), strict=True):
        assert (np.diff(scores[np.argsort(row, kind="stable")]) >= 0).all()
        assert scores[np.argmax(row)] == scores.max()


@given(arrays.arrays(np.float32, (2, 5), elements=st.floats(-20, 20, width=32)))
def test_softmax_computes_the_formula(logits: NDArray[np.float32]) -> None:
    exponentials = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(softmax(logits), exponentials / exponentials.sum(axis=1, keepdims=True), rtol=1e-12)


@given(logit_batches)
@example(np.array([[3e38, -3e38, 0, -120, 120]], np.float32))
def test_sigmoid_computes_the_formula(logits: NDArray[np.float32]) -> None:
    scores = sigmoid(logits)
    assert scores.dtype == np.float64
    assert ((scores >= 0) & (scores <= 1)).all()
    moderate = np.abs(logits) < 700
    exact = 1 / (1 + np.exp(-logits[moderate].astype(np.float64)))
    np.testing.assert_allclose(scores[moderate], exact, rtol=1e-12)
    assert (np.diff(np.sort(scores, axis=1)) >= 0).all()
    assert ((scores == 1) == (logits > 36.7))[~moderate].all()


def spec_of(base: ModelSpec, **fields: Any) -> ModelSpec:
    return msgspec.structs.replace(base, **fields)


ROW = np.array([[2, -1, 0.5]], np.float32)


def test_the_scores_follow_the_output_and_the_activation() -> None:
    assert class_scores(ROW, SOFTMAX) == pytest.approx(softmax(ROW))
    assert class_scores(ROW, LABELS) == pytest.approx(1 / (1 + np.exp(-ROW)))
    probabilities = np.array([[0.25, 0.5, 0.125]], np.float32)
    for spec in (SOFTMAX, LABELS):
        assert class_scores(probabilities, spec_of(spec, output="probabilities")).tolist() == probabilities.tolist()


def test_two_classes_with_one_output_share_a_score_of_one() -> None:
    logits = np.array([[0], [2], [-800]], np.float32)
    scores = class_scores(logits, BINARY)
    assert scores[:, 1] == pytest.approx([0.5, 1 / (1 + np.exp(-2)), 0])
    assert scores.sum(axis=1) == pytest.approx(1)
    probabilities = np.array([[0.25]], np.float32)
    assert class_scores(probabilities, spec_of(BINARY, output="probabilities")).tolist() == [[0.75, 0.25]]


def test_the_second_class_is_predicted_from_its_threshold_on() -> None:
    probabilities = np.array([[0.0], [0.25], [0.5], [1.0]], np.float32)
    binary = spec_of(BINARY, output="probabilities")
    assert predicted_classes(probabilities, binary).tolist() == [0, 0, 1, 1]
    assert predicted_classes(probabilities, spec_of(binary, thresholds=(0.25,))).tolist() == [0, 1, 1, 1]
    assert predicted_classes(probabilities, spec_of(binary, thresholds=(0.75,))).tolist() == [0, 0, 0, 1]
    assert applicable_labels(probabilities, binary).tolist() == [[True, False]] * 2 + [[False, True]] * 2


def test_a_label_applies_from_its_threshold_on() -> None:
    probabilities = np.array([[0.5, 0.25, 0.75], [0.0, 0.125, 0.0]], np.float32)
    labels = spec_of(LABELS, output="probabilities")
    assert applicable_labels(probabilities, labels).tolist() == [[True, False, True], [False] * 3]
    low = spec_of(labels, thresholds=(0.75, 0.125, 0.75))
    assert applicable_labels(probabilities, low).tolist() == [[False, True, True], [False, True, False]]
    assert predicted_classes(probabilities, low).tolist() == [2, 1]


def test_scores_are_compared_with_thresholds_in_single_precision() -> None:
    """A threshold of 0.7 is reached by the float32 closest to it, which is smaller."""
    labels = spec_of(LABELS, output="probabilities", thresholds=(0.7, 0.1, 0.3))
    assert applicable_labels(np.array([[0.7, 0.1, 0.3]], np.float32), labels).all()
    assert class_scores(np.zeros((1, 3), np.float32), LABELS).tolist() == [[0.5] * 3]


@pytest.mark.parametrize("base", [SOFTMAX, LABELS])
@given(logits=arrays.arrays(np.float32, (4, 3), elements=finite), temperature=st.floats(0.01, 100))
@example(logits=np.full((4, 3), -1e-7, np.float32), temperature=100)
@example(logits=np.full((4, 3), 3e38, np.float32), temperature=0.01)
def test_a_temperature_changes_no_decision_and_no_order(
    base: ModelSpec, logits: NDArray[np.float32], temperature: float
) -> None:
    calibrated = spec_of(base, temperature=temperature)
    scores = class_scores(logits, calibrated)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert predicted_classes(logits, calibrated).tolist() == predicted_classes(logits, base).tolist()
    assert applicable_labels(logits, calibrated).tolist() == applicable_labels(logits, base).tolist()
    for row, row_scores in zip(logits, scores, strict=True):
        assert (np.diff(row_scores[np.argsort(row, kind="stable")]) >= 0).all()
    binary = spec_of(BINARY, temperature=temperature)
    assert predicted_classes(logits[:, :1], binary).tolist() == predicted_classes(logits[:, :1], BINARY).tolist()


@given(logit_batches)
def test_a_temperature_of_one_gives_the_same_bits(logits: NDArray[np.float32]) -> None:
    for base in (SOFTMAX, LABELS):
        assert class_scores(logits, spec_of(base, temperature=1.0)).tobytes() == class_scores(logits, base).tobytes()


def test_the_logits_are_divided_by_the_temperature() -> None:
    assert class_scores(ROW, spec_of(SOFTMAX, temperature=2.0)) == pytest.approx(softmax(ROW / 2))
    assert class_scores(ROW, spec_of(LABELS, temperature=0.5)) == pytest.approx(sigmoid(ROW * 2))


def test_probabilities_have_no_temperature() -> None:
    with pytest.raises(ValueError, match="temperature needs output logits, not probabilities"):
        ModelSpec(
            model="any",
            class_names=("a", "b"),
            input=InputSpec(height=4, width=4),
            output="probabilities",
            temperature=2,
        )


@given(arrays.arrays(np.float32, (4, 3), elements=finite))
def test_one_label_of_a_softmax_applies(logits: NDArray[np.float32]) -> None:
    applicable = applicable_labels(logits, SOFTMAX)
    assert (applicable.sum(axis=1) == 1).all()
    assert applicable.argmax(axis=1).tolist() == predicted_classes(logits, SOFTMAX).tolist()
    assert predicted_classes(logits, SOFTMAX).tolist() == logits.argmax(axis=1).tolist()


@given(logits=arrays.arrays(np.float32, (4, 3), elements=finite), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_higher_threshold_never_adds_a_label(logits: NDArray[np.float32], low: float, high: float) -> None:
    low, high = sorted((low, high))
    few = applicable_labels(logits, spec_of(LABELS, thresholds=(high,) * 3))
    many = applicable_labels(logits, spec_of(LABELS, thresholds=(low,) * 3))
    assert not (few & ~many).any()
