"""Ties between several ways to preprocess images."""

import numpy as np

from cifarx_export.diagnosis.ranking import LEVEL, find_ties

RANDOM = np.random.default_rng(0)
SEARCHED, ALL, CANDIDATES, FINALISTS = 576, 1000, 100, 7


def test_luck_is_a_tie() -> None:
    """Of many equally good candidates, the luckiest is not called better than a given one more often than stated."""
    errors, runs = 0, 400
    for _ in range(runs):
        correct = RANDOM.random((CANDIDATES, ALL)) < RANDOM.random(ALL) * 0.6
        given, others = correct[0], correct[1:]
        kept = others[np.argsort(-others[:, :SEARCHED].sum(1))[: FINALISTS - 1]]
        finalists = np.concatenate([kept, given[None]])
        ranked = finalists[np.argsort(-finalists.sum(1), kind="stable")]
        errors += not all(find_ties([row[SEARCHED:] for row in ranked]))
    assert errors / runs <= LEVEL


def test_a_better_way_is_found() -> None:
    better = RANDOM.random(400) < 0.5
    worse = better & (RANDOM.random(400) < 0.6)
    assert find_ties([better, better.copy(), worse]) == [True, True, False]


def test_one_way_alone_is_a_tie_with_itself() -> None:
    assert find_ties([np.ones(3, np.bool_)]) == [True]
