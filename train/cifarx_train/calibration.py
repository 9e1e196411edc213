"""Calibrated scores: how far scores are from the accuracy that they claim, and the temperature that corrects them."""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.scores import softmax

BINS: Final = 15
"""The number of bins of the expected calibration error, as in the papers that use it."""

MIN_IMAGES: Final = 100
"""The fewest images that a temperature is fitted to. Its standard error is then 13 % in simulations of five classes."""

_LOWEST: Final = 0.05
_HIGHEST: Final = 20.0
_BISECTIONS: Final = 30  # narrows the range of 400:1 down to a few billionths


class Calibration(NamedTuple):
    """A temperature and what it changes.

    Attributes:
        temperature: what the logits are divided by.
        images: the number of images that it was fitted to.
        source: where these images are from: "val", or "train" for a part of the training images that was held out.
        ece_before, ece_after: the expected calibration error on the test split without and with the temperature.
    """

    temperature: float
    images: int
    source: str
    ece_before: float
    ece_after: float


class NoTemperature(Exception):
    """No temperature fits the logits. The text says why."""


def expected_calibration_error(
    logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float = 1.0
) -> float:
    """Return the mean difference between the score of the predicted class and the accuracy, from 0 to 1.

    The scores are put into 15 bins of equal width. The differences of the bins are weighted by their numbers of images
    (Guo et al., 2017, arXiv:1706.04599).

    Args:
        logits: (N, classes).
        labels: (N,).
        temperature: what the logits are divided by.
    """
    predicted = logits.argmax(axis=1)
    scores = softmax(np.divide(logits, temperature, dtype=np.float64))[np.arange(len(logits)), predicted]
    # A bin contains its upper edge and not its lower one.
    bins = np.clip(np.ceil(scores * BINS).astype(np.int64) - 1, 0, BINS - 1)
    surplus = np.bincount(bins, scores - (predicted == labels), minlength=BINS)
    return float(np.abs(surplus).sum() / len(logits))


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the temperature with the smallest cross-entropy, from 0.05 to 20.

    The cross-entropy is convex in the inverse of the temperature, so its derivative has at most one root, which is
    found by bisection.

    Args:
        logits: (N, classes), of images that the model was not trained on.
        labels: (N,).

    Raises:
        NoTemperature: there are too few images, or the cross-entropy has no minimum in this range.
    """
    if len(logits) < MIN_IMAGES:
        raise NoTemperature(f"there are {len(logits):,} images, and a temperature needs at least {MIN_IMAGES}")
    own = logits[np.arange(len(logits)), labels].astype(np.float64)
    low, high = 1 / _HIGHEST, 1 / _LOWEST
    if _slope(logits, own, high) < 0:
        accuracy = float((logits.argmax(axis=1) == labels).mean())
        raise NoTemperature(f"the loss still falls at a temperature of {_LOWEST:g} (accuracy {accuracy:.2%})")
    if _slope(logits, own, low) > 0:
        raise NoTemperature(f"the loss still falls at a temperature of {_HIGHEST:g}, as for a guess")
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        if _slope(logits, own, middle) < 0:
            low = middle
        else:
            high = middle
    return 2 / (low + high)


def _slope(logits: NDArray[np.float32], own: NDArray[np.float64], inverse: float) -> float:
    """Return the derivative of the mean cross-entropy by the inverse of the temperature.

    Args:
        logits: (N, classes).
        own: the logits of the true classes, (N,).
        inverse: the inverse of the temperature.
    """
    expected = (softmax(np.multiply(logits, inverse, dtype=np.float64)) * logits).sum(axis=1)
    return float((expected - own).mean())
