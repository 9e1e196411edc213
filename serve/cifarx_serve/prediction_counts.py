"""How often a model predicts each class, and how high the scores of its predictions are.

The counts of live requests are compared with those of the test images, to notice inputs of another kind.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.scores import applicable_labels, class_scores
from cifarx_serve.spec import ModelSpec

SCORE_BOUNDS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The upper bounds of the bins of scores; a score belongs to the first bin whose bound it does not exceed."""

_MIN_SHARE: Final = 1e-4
"""The share that an empty bin is taken for: the logarithm of zero is not finite."""


class PredictionCounts(NamedTuple):
    """The predictions for some images.

    Attributes:
        images: the number of images whose outputs are finite.
        classes: how often each class was predicted, int64 (classes,).
        scores: how many images have a score in each bin of `SCORE_BOUNDS`, int64 (bins,).
        score_sum: the sum of the scores.
    """

    images: int
    classes: NDArray[np.int64]
    scores: NDArray[np.int64]
    score_sum: float


def count_predictions(outputs: NDArray[np.float32], spec: ModelSpec) -> PredictionCounts:
    """Count the predictions of a model.

    The prediction for an image is its best class, or all labels that apply to it. Its score is that of the best class.

    Args:
        outputs: logits or probabilities as the spec says, (N, output_size). Rows that are not finite are left out.
        spec: the model's spec.
    """
    finite = outputs[np.isfinite(outputs).all(axis=1)]
    best = class_scores(finite, spec).max(axis=1)
    bins = np.searchsorted(SCORE_BOUNDS, np.minimum(best, SCORE_BOUNDS[-1]))
    return PredictionCounts(
        len(finite),
        applicable_labels(finite, spec).sum(axis=0, dtype=np.int64),
        np.bincount(bins, minlength=len(SCORE_BOUNDS)),
        float(best.sum()),
    )


def population_stability_index(expected: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Return the population stability index of a distribution: 0 if it is the expected one.

    It is the sum over the bins of (found - expected) * ln(found / expected), the symmetric Kullback-Leibler divergence
    (Siddiqi, Credit Risk Scorecards, 2006, which calls values over 0.1 a small change and over 0.25 a significant one).

    Args:
        expected: the counts or rates of the bins that are expected; their sum is not zero.
        found: the counts or rates that were found, in the same order; their sum is not zero.
    """
    shares = [np.maximum(rates / rates.sum(), _MIN_SHARE) for rates in (expected, found)]
    return float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
