"""The order of classes, from made-up predictions."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_export.diagnosis.class_order import UNKNOWN, best_order, complete_names, known_orders

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 6, 300)
CLASSES = ("a", "b", "c", "d", "e", "f")


def predictions(order: NDArray[np.int64], accuracy: float) -> NDArray[np.int64]:
    """Return predictions of a network whose outputs have an order, of which this share is correct."""
    correct = RANDOM.random(len(LABELS)) < accuracy
    return np.where(correct, order[LABELS], RANDOM.integers(0, 6, len(LABELS)))


def test_the_stated_order_is_kept_if_it_is_as_good() -> None:
    orders = known_orders(CLASSES, CLASSES, stated=True)
    assert orders is not None
    assert set(orders) == {"as stated"}  # which is also the sorted one
    found = best_order(predictions(np.arange(6), 0.5), LABELS, orders)
    assert found.name == "as stated"
    assert found.correct.mean() == pytest.approx(0.58, abs=0.06)


def test_the_sorted_order_is_found() -> None:
    orders = known_orders(CLASSES, tuple(reversed(CLASSES)), stated=True)
    assert orders is not None
    found = best_order(predictions(np.arange(6), 0.5), LABELS, orders)
    assert found.name == "sorted"


def test_any_order_is_found_and_judged_on_other_images() -> None:
    order = np.array([3, 0, 5, 1, 2, 4])
    orders = known_orders(CLASSES, CLASSES, stated=True)
    assert orders is not None
    found = best_order(predictions(order, 0.6), LABELS, orders)
    assert (found.name, found.outputs.tolist()) == ("assigned", order.tolist())
    assert found.correct.mean() == pytest.approx(0.66, abs=0.06)
    assert complete_names(found, CLASSES, 6) == ["b", "d", "e", "a", "f", "c"]


@pytest.mark.parametrize("seed", range(1, 11))  # the labels are of seed 0
def test_guesses_are_not_assigned_to_look_better(seed: int) -> None:
    """An assignment that is judged on the images that it fits would be better than chance."""
    guesses = np.random.default_rng(seed).integers(0, 6, 60)
    orders = known_orders(CLASSES, CLASSES, stated=True)
    assert orders is not None
    found = best_order(guesses, LABELS[:60], orders)
    assert found.correct.mean() < 0.34


def test_classes_of_a_larger_network_are_assigned_to_its_outputs() -> None:
    names = tuple(f"n{number}" for number in range(1000))
    orders = known_orders(CLASSES, names, stated=True)
    assert orders is not None
    assert set(orders) == {"sorted"}  # the names say nothing about these classes
    outputs = np.array([7, 99, 500, 501, 2, 998])
    found = best_order(outputs[LABELS], LABELS, orders)
    assert found.outputs.tolist() == outputs.tolist()
    assert found.correct.all()
    completed = complete_names(found, CLASSES, 1000)
    assert (completed[7], completed[998], completed[0]) == ("a", "f", "class 0")


def test_a_class_without_a_correct_prediction_has_no_output() -> None:
    orders = known_orders(CLASSES, CLASSES, stated=True)
    assert orders is not None
    order = np.array([1, 0, 3, 2, 5, 4])
    predicted = np.where(LABELS == 0, order[1], order[LABELS])
    found = best_order(predicted, LABELS, orders)
    assert sorted(found.outputs[:2].tolist()) == [UNKNOWN, 0]  # both classes are predicted as output 0
    assert found.outputs[2:].tolist() == [3, 2, 5, 4]
    assert complete_names(found, CLASSES, 6)[1] == "class 1"


def test_a_network_with_too_few_classes_has_no_order() -> None:
    assert known_orders(CLASSES, CLASSES[:5], stated=True) is None


def test_assumed_names_are_no_order() -> None:
    orders = known_orders(CLASSES, CLASSES, stated=False)
    assert orders is not None
    assert set(orders) == {"sorted"}
