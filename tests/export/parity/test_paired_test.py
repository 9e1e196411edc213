"""The paired test of two classifiers."""

import numpy as np
import pytest

from cifarx_export.parity.paired_test import is_better


@pytest.mark.parametrize(("wins", "losses", "better"), [(9, 1, True), (7, 3, False), (5, 0, True), (4, 0, False)])
def test_the_paired_test_looks_at_the_images_that_differ(wins: int, losses: int, better: bool) -> None:
    one = np.array([True] * wins + [False] * losses + [True] * 500)
    other = np.array([False] * wins + [True] * losses + [True] * 500)
    assert is_better(one, other, 0.05) is better
    assert not is_better(other, one, 0.05)
