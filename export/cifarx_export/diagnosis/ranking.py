"""Which of several ways to preprocess images is better than the others, and which only had more luck."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.paired_test import is_better

LEVEL: Final = 0.05
"""The probability that any of several equally good ways is called better than another."""


def find_ties(correct: Sequence[NDArray[np.bool_]]) -> list[bool]:
    """Return for each way to preprocess images whether the first one is not significantly better.

    The test is McNemar's for paired predictions. Any of them may be the first by luck, so the level is divided by the
    number of ordered pairs (Bonferroni). That covers the choice of the first one, but not that of the others among
    candidates: the images must not have been used for it.

    Args:
        correct: whether each prediction is correct, (N,), the first one first.
    """
    pairs = len(correct) * (len(correct) - 1)
    return [not is_better(correct[0], other, LEVEL / max(1, pairs)) for other in correct]
