"""Assign the rows of a matrix to its columns, so that the sum of the chosen entries is as large as possible."""

import numpy as np
from numpy.typing import NDArray


def assign(gain: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the column of each row, (rows,): different columns with the largest possible sum of `gain`.

    This is the Hungarian method (Kuhn, 1955, doi:10.1002/nav.3800020109) as shortest augmenting paths, for
    rectangular matrices (Crouse, 2016, doi:10.1109/TAES.2016.140952). The time grows with rows² times columns.

    Args:
        gain: (rows, columns), with at least as many columns as rows.
    """
    rows, columns = gain.shape
    cost = (gain.max(initial=0) - gain).astype(np.float64)
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1)
    for row in range(rows):
        distance, previous = np.full(columns, np.inf), np.full(columns, -1)
        done = np.zeros(columns, np.bool_)
        current, last, shortest = row, -1, 0.0
        while current != -1:
            through = shortest + cost[current] - row_price[current] - column_price
            closer = ~done & (through < distance)
            distance[closer], previous[closer] = through[closer], last
            last = int(np.where(done, np.inf, distance).argmin())
            shortest = float(distance[last])
            done[last] = True
            current = row_of[last]
        _update_prices(row, row_of, done, distance, shortest, row_price, column_price)
        while last != -1:  # flip the assignments along the path
            before = previous[last]
            row_of[last] = row if before == -1 else row_of[before]
            last = before
    column_of = np.full(rows, -1)
    column_of[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    return column_of


def _update_prices(
    row: int,
    row_of: NDArray[np.int64],
    done: NDArray[np.bool_],
    distance: NDArray[np.float64],
    shortest: float,
    row_price: NDArray[np.float64],
    column_price: NDArray[np.float64],
) -> None:
    """Keep the reduced cost of every assigned pair at zero, and of all others at zero or more."""
    row_price[row] += shortest
    reached = done & (row_of >= 0)
    row_price[row_of[reached]] += shortest - distance[reached]
    column_price[done] -= shortest - distance[done]
