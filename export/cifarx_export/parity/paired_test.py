"""Test whether one classifier is better than another on the same images."""

import numpy as np
from numpy.typing import NDArray

from cifarx_train.binomial import upper_tail


def is_better(one: NDArray[np.bool_], other: NDArray[np.bool_], level: float) -> bool:
    """Return whether more predictions are correct for the same images, by McNemar's exact one-sided test.

    The test looks only at images for which the two differ (McNemar, 1947, doi:10.1007/BF02295996). It holds for two
    classifiers that were chosen without these images: a choice of the best of many on them needs a level divided by the
    number of comparisons (Bonferroni).

    Args:
        one, other: whether each prediction is correct, (N,).
        level: the level of significance.
    """
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    return wins > losses and upper_tail(wins, wins + losses, 0.5) < level
