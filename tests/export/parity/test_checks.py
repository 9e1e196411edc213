"""The metrics and checks of made-up logits; `test_compare.py` checks whole artifacts."""

import numpy as np
import pytest

from cifarx_export.parity.checks import PairedLogits, check_metrics, compute_metrics, worst_per_image
from cifarx_export.parity.tolerances import Tolerance, get_tolerance

REFERENCE = np.eye(4, dtype=np.float32).repeat(25, axis=0)
LABELS = REFERENCE.argmax(1)


def pair(change: np.ndarray | float = 0.0, positions: np.ndarray | None = None) -> PairedLogits:
    rows = np.arange(100) if positions is None else positions
    return PairedLogits(rows, REFERENCE[rows], (REFERENCE[rows] + change).astype(np.float32))


def flips(count: int) -> np.ndarray:
    """Return what to add to all logits so that the first `count` images change to another class by a wide margin."""
    change = np.zeros((100, 4), np.float32)
    change[:count, 3] = 5
    return change


def failed(logits: PairedLogits, tolerance: Tolerance) -> set[str]:
    metrics = compute_metrics([logits], [], REFERENCE, LABELS, tolerance)
    return {check.name for check in check_metrics(metrics, tolerance) if not check.passed}


@pytest.mark.parametrize(
    ("precision", "count", "names"),
    [
        ("fp32", 0, set()),
        ("fp32", 1, {"tolerance", "agreement"}),
        ("fp16", 0, set()),
        ("fp16", 1, {"agreement"}),
        ("int8", 1, {"accuracy"}),  # 1 % of flips is allowed, a drop of 1 point in accuracy is not
        ("int8", 2, {"agreement", "accuracy"}),
    ],
)
def test_each_precision_has_its_tolerance(precision: str, count: int, names: set[str]) -> None:
    assert failed(pair(flips(count)), get_tolerance(precision)) == names


def test_an_artifact_without_logits_has_no_checks() -> None:
    metrics = compute_metrics([], [], REFERENCE, LABELS, get_tolerance("fp32"))
    assert (metrics.errors, metrics.agreement, metrics.accuracy, metrics.reference_accuracy) == (None, 0.0, None, 1.0)
    assert check_metrics(metrics, get_tolerance("fp32")) == []


def test_edge_inputs_count_in_the_errors_but_not_in_the_agreement() -> None:
    edge = PairedLogits(np.empty(0, np.int64), REFERENCE[:1], REFERENCE[:1] + np.array([[0, 2, 0, 0]], np.float32))
    metrics = compute_metrics([pair()], [edge], REFERENCE, None, get_tolerance("fp32"))
    assert metrics.errors is not None
    assert (metrics.errors.max_abs, metrics.agreement, metrics.accuracy) == (2.0, 1.0, None)


def test_the_worst_row_of_each_image_is_kept() -> None:
    """A small flip at one batch size is worse than a larger error without a flip at another."""
    change = np.zeros((100, 4), np.float32)
    change[10, 0] = 3
    change[20, 0] = 1
    some = np.array([5, 10, 20])
    small = np.array([[0.5, 0, 0, 0], [0, 1.5, 0, 0], [0.25, 0, 0, 0]], np.float32)
    positions, reference, artifact = worst_per_image([pair(change), pair(small, some)])
    np.testing.assert_array_equal(positions, np.arange(100))
    np.testing.assert_array_equal(reference, REFERENCE)
    error = artifact - reference
    assert (error[5, 0], error[20, 0]) == (0.5, 1.0)
    assert error[10].tolist() == [0, 1.5, 0, 0]
    assert np.count_nonzero(error) == 3


def test_images_without_logits_are_left_out() -> None:
    some = np.array([3, 50])
    assert worst_per_image([pair(0.0, some), pair(1.0, some)]).positions.tolist() == [3, 50]
