"""Exact binomial statistics: how sure a share of images is, and whether it could be chance."""

import math
from typing import Final, NamedTuple

import numpy as np

CONFIDENCE: Final = 0.95
"""The confidence of every bound that is reported."""

_BISECTIONS: Final = 50  # halves an interval of length 1 down to the precision of a double


class Interval(NamedTuple):
    """A two-sided confidence interval of a share, 0 to 1."""

    low: float
    high: float


def upper_tail(successes: int, trials: int, share: float) -> float:
    """Return the probability of at least this number of successes, each with probability `share`."""
    if successes <= 0:
        return 1.0
    if share <= 0 or successes > trials:
        return 0.0
    if share >= 1:
        return 1.0
    # The terms are summed relative to the largest one, which does not underflow.
    counts = np.arange(successes, trials)
    ratios = np.log((trials - counts) / (counts + 1)) + math.log(share) - math.log1p(-share)
    first = (
        math.lgamma(trials + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(trials - successes + 1)
        + successes * math.log(share)
        + (trials - successes) * math.log1p(-share)
    )
    terms = first + np.concatenate([[0.0], np.cumsum(ratios)])
    largest = float(terms.max())
    return min(1.0, math.exp(largest) * float(np.exp(terms - largest).sum()))


def lower_bound(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided lower bound of a share: the smallest that still gives this result with 1 - confidence.

    The bound is exact for any number of trials (Clopper and Pearson, 1934, doi:10.1093/biomet/26.4.404).

    Args:
        successes: number of successes.
        trials: number of trials, at least 1.
        confidence: the probability that the bound holds.
    """
    if successes == trials:
        return math.pow(1 - confidence, 1 / trials)
    low, high = 0.0, successes / trials
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if upper_tail(successes, trials, middle) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the two-sided interval of a share by the method of `lower_bound`, with half of the risk on each side."""
    one_sided = (1 + confidence) / 2
    return Interval(lower_bound(successes, trials, one_sided), 1 - lower_bound(trials - successes, trials, one_sided))


def floor_percent(share: float) -> str:
    """Format a lower bound as a percentage, rounded down to two digits."""
    return f"{math.floor(share * 1e4) / 100:.2f}%"
