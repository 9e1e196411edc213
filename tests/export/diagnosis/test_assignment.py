"""The assignment, compared with all permutations."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from cifarx_export.diagnosis.assignment import assign


@st.composite
def gains(draw: st.DrawFn) -> NDArray[np.int64]:
    rows = draw(st.integers(1, 5))
    return draw(arrays(np.int64, (rows, rows + draw(st.integers(0, 2))), elements=st.integers(0, 9)))


@given(gains())
def test_no_permutation_gains_more(gain: NDArray[np.int64]) -> None:
    rows, columns = gain.shape
    chosen = assign(gain)
    assert len(set(chosen.tolist())) == rows
    best = max(
        sum(gain[row, column] for row, column in enumerate(columns_of_rows))
        for columns_of_rows in itertools.permutations(range(columns), rows)
    )
    assert gain[np.arange(rows), chosen].sum() == best


def test_a_permuted_diagonal_is_found() -> None:
    order = np.random.default_rng(0).permutation(200)
    gain = np.zeros((200, 200), np.int64)
    gain[np.arange(200), order] = 3
    gain += np.random.default_rng(1).integers(0, 2, gain.shape)
    np.testing.assert_array_equal(assign(gain), order)
