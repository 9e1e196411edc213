"""Precision, recall and F1 of every class, from a confusion matrix."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ClassMetrics(NamedTuple):
    """The metrics of one class, each from 0 to 1.

    Attributes:
        name: the name of the class.
        precision: the fraction of the images predicted as this class that show it; 0 if none was predicted.
        recall: the fraction of the images of this class that were predicted as it; None without such images.
        f1: the harmonic mean of precision and recall, 0 if both are; None without images of the class.
        support: the number of images of this class.
    """

    name: str
    precision: float
    recall: float | None
    f1: float | None
    support: int


class MacroAverage(NamedTuple):
    """The unweighted means over the classes that have images, in which a rare class counts as much as any other."""

    precision: float
    recall: float
    f1: float


def class_metrics(matrix: NDArray[np.int64], class_names: Sequence[str]) -> list[ClassMetrics]:
    """Return the metrics of every class, in label order.

    Args:
        matrix: int64 (classes, classes), the number of images by true class (row) and predicted class (column).
        class_names: the classes in label order.
    """
    correct, predicted, support = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    precision = correct / np.maximum(predicted, 1)
    recall = correct / np.maximum(support, 1)
    f1 = 2 * correct / np.maximum(predicted + support, 1)
    rows = zip(class_names, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return [
        ClassMetrics(*row) if row[-1] else ClassMetrics(row[0], row[1], recall=None, f1=None, support=0) for row in rows
    ]


def macro_average(metrics: Sequence[ClassMetrics]) -> MacroAverage:
    """Return the means over the classes that have images, NaN if none has."""
    measured = [each for each in metrics if each.support]
    if not measured:
        return MacroAverage(math.nan, math.nan, math.nan)
    columns = zip(*((each.precision, each.recall or 0.0, each.f1 or 0.0) for each in measured), strict=True)
    return MacroAverage(*(sum(column) / len(measured) for column in columns))


def worst_first(metrics: Sequence[ClassMetrics]) -> list[ClassMetrics]:
    """Return the classes that have images, sorted by F1 from the lowest. Equal ones stay in label order."""
    return sorted((each for each in metrics if each.support), key=lambda each: each.f1 or 0.0)
