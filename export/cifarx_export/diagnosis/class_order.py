"""Find the order of a network's classes from its predictions on labeled images."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_export.diagnosis.assignment import assign
from cifarx_export.parity.paired_test import is_better

OrderName: TypeAlias = Literal["as stated", "sorted", "assigned"]

UNKNOWN: Final = -1

_LEVEL: Final = 0.001
"""Another order than the stated one has to be better at this level of significance. It is low because the order is
chosen again for every preprocessing that is tried."""


class ClassOrder(NamedTuple):
    """Which output of the network each class of a dataset is.

    Attributes:
        name: "as stated" by the names of the network's classes; "sorted" for the order of the dataset; "assigned" for
            the best assignment of classes to outputs.
        outputs: the output of each class of the dataset, (classes,); `UNKNOWN` for a class without one.
        correct: whether each prediction is correct in this order, (N,). For an assignment, each half of the images is
            judged by the assignment of the other half.
    """

    name: OrderName
    outputs: NDArray[np.int64]
    correct: NDArray[np.bool_]


def best_order(
    predictions: NDArray[np.int64], labels: NDArray[np.int64], known: Mapping[OrderName, NDArray[np.int64]]
) -> ClassOrder:
    """Return the order in which the most predictions are correct.

    Args:
        predictions: the predicted output of each image, (N,).
        labels: the class of each image in the dataset, (N,).
        known: the output of each class, (classes,), in the orders to try. Each one, and the best assignment after them,
            has to be better than those before it.
    """
    orders = [ClassOrder(name, outputs, outputs[labels] == predictions) for name, outputs in known.items()]
    classes = len(orders[0].outputs)
    best = orders[0]
    for order in [*orders[1:], _assigned(predictions, labels, classes)]:
        if is_better(order.correct, best.correct, _LEVEL):
            best = order
    return best


def known_orders(
    classes: Sequence[str], class_names: Sequence[str], stated: bool
) -> dict[OrderName, NDArray[np.int64]] | None:
    """Return the orders to try for the classes of a dataset; None if the network has too few classes.

    Args:
        classes: the classes of the dataset, sorted.
        class_names: the names of the network's classes.
        stated: whether somebody stated these names.
    """
    if len(classes) > len(class_names):
        return None
    orders: dict[OrderName, NDArray[np.int64]] = {}
    if stated and all(class_names.count(name) == 1 for name in classes):
        orders["as stated"] = np.array([class_names.index(name) for name in classes])
    in_order = np.arange(len(classes))
    if not any(np.array_equal(outputs, in_order) for outputs in orders.values()):
        orders["sorted"] = in_order
    return orders


def complete_names(order: ClassOrder, classes: Sequence[str], outputs: int) -> list[str]:
    """Return the name of each output. Outputs that are no class of the dataset keep their number as a name."""
    names = [f"class {number}" for number in range(outputs)]
    for name, output in zip(classes, order.outputs.tolist(), strict=True):
        if output != UNKNOWN:
            names[output] = name
    return names


def _assigned(predictions: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> ClassOrder:
    """Assign classes to outputs on all images, and judge that on halves: the images that fit it flatter it."""
    first = np.arange(len(labels)) % 2 == 0
    correct = np.zeros(len(labels), np.bool_)
    for half in (first, ~first):
        assignment = _fit(predictions[half], labels[half], classes)
        correct[~half] = assignment[labels[~half]] == predictions[~half]
    return ClassOrder("assigned", _fit(predictions, labels, classes), correct)


def _fit(predictions: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return the output of each class with the largest number of correct predictions, `UNKNOWN` without any."""
    rows, columns = np.unique(labels), np.unique(predictions)
    confusion = np.zeros((len(rows), max(len(columns), len(rows))), np.int64)
    np.add.at(confusion, (np.searchsorted(rows, labels), np.searchsorted(columns, predictions)), 1)
    outputs = np.full(classes, UNKNOWN)
    chosen = assign(confusion)
    for row, column in enumerate(chosen):
        if column < len(columns) and confusion[row, column]:
            outputs[rows[row]] = columns[column]
    return outputs
