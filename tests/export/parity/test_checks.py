"""The verdict, of answers that no runtime gave; whole artifacts are in test_proof.py."""

import numpy as np
import pytest

from cifarx_export.parity.checks import Answers, judge, measure, worst_of_each
from cifarx_export.parity.tolerances import Tolerance, gate

REFERENCE = np.eye(4, dtype=np.float32).repeat(25, axis=0)
LABELS = REFERENCE.argmax(1)


def answers(change: np.ndarray | float = 0.0, positions: np.ndarray | None = None) -> Answers:
    rows = np.arange(100) if positions is None else positions
    return Answers(rows, REFERENCE[rows], (REFERENCE[rows] + change).astype(np.float32))


def flips(count: int) -> np.ndarray:
    """Added to all answers: the first `count` become another class, by far."""
    change = np.zeros((100, 4), np.float32)
    change[:count, 3] = 5
    return change


def failed(found: Answers, limits: Tolerance) -> set[str]:
    figures = measure([found], None, REFERENCE, LABELS, limits)
    return {check.name for check in judge(figures, limits) if not check.passed}


@pytest.mark.parametrize(
    ("precision", "count", "names"),
    [
        ("fp32", 0, set()),
        ("fp32", 1, {"tolerance", "agreement"}),
        ("fp16", 0, set()),
        ("fp16", 1, {"agreement"}),
        ("int8", 1, {"accuracy"}),  # a hundredth flipped is allowed, a point of accuracy is not
        ("int8", 2, {"agreement", "accuracy"}),
    ],
)
def test_gates(precision: str, count: int, names: set[str]) -> None:
    assert failed(answers(flips(count)), gate(precision)) == names


def test_no_answer_is_not_judged() -> None:
    figures = measure([], None, REFERENCE, LABELS, gate("fp32"))
    assert (figures.errors, figures.agreement, figures.accuracy, figures.reference_accuracy) == (None, 0.0, None, 1.0)
    assert judge(figures, gate("fp32")) == []


def test_edge_inputs_count_among_the_errors_and_not_in_agreement() -> None:
    edge = Answers(np.empty(0, np.int64), REFERENCE[:1], REFERENCE[:1] + np.array([[0, 2, 0, 0]], np.float32))
    figures = measure([answers()], edge, REFERENCE, None, gate("fp32"))
    assert figures.errors is not None
    assert (figures.errors.max_abs, figures.agreement, figures.accuracy) == (2.0, 1.0, None)


def test_each_image_by_its_worst_answer() -> None:
    """At another batch size one image flips by little, which is worse than the larger error that the whole has."""
    change = np.zeros((100, 4), np.float32)
    change[10, 0] = 3
    change[20, 0] = 1
    some = np.array([5, 10, 20])
    small = np.array([[0.5, 0, 0, 0], [0, 1.5, 0, 0], [0.25, 0, 0, 0]], np.float32)
    positions, reference, artifact = worst_of_each([answers(change), answers(small, some)])
    np.testing.assert_array_equal(positions, np.arange(100))
    np.testing.assert_array_equal(reference, REFERENCE)
    error = artifact - reference
    assert (error[5, 0], error[20, 0]) == (0.5, 1.0)
    assert error[10].tolist() == [0, 1.5, 0, 0]
    assert np.count_nonzero(error) == 3


def test_images_without_an_answer_are_left_out() -> None:
    some = np.array([3, 50])
    assert worst_of_each([answers(0.0, some), answers(1.0, some)]).positions.tolist() == [3, 50]
