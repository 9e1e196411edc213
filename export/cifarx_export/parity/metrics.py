"""Error statistics and argmax flips between two sets of logits for the same images."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.tolerances import Tolerance

Logits = NDArray[np.float32]


class LogitErrors(NamedTuple):
    """Statistics of the absolute errors of logits.

    Attributes:
        max_abs, mean_abs, p999_abs: maximum, mean and 99.9th percentile, over the logits that are finite on both sides.
        required_tolerance: the smallest t with `|error| <= t + t * |reference|` for all of these logits.
        outside: number of these logits outside the tolerance.
        nonfinite: number of logits that are NaN or Inf on either side.
    """

    max_abs: float
    mean_abs: float
    p999_abs: float
    required_tolerance: float
    outside: int
    nonfinite: int


class Flips(NamedTuple):
    """Images whose argmax differs: their positions, and whether each flip is forgiven."""

    positions: NDArray[np.int64]
    forgiven: NDArray[np.bool_]


def compute_errors(reference: Logits, artifact: Logits, tolerance: Tolerance) -> LogitErrors:
    """Return the errors of the artifact's logits, computed in float64.

    Args:
        reference, artifact: logits, (N, classes), N at least 1.
        tolerance: the tolerance that counts `outside`.
    """
    finite = np.isfinite(reference) & np.isfinite(artifact)
    expected = reference.astype(np.float64)[finite]
    error = np.abs(artifact.astype(np.float64)[finite] - expected)
    if not error.size:
        return LogitErrors(np.inf, np.inf, np.inf, np.inf, artifact.size, artifact.size)
    return LogitErrors(
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        p999_abs=float(np.percentile(error, 99.9)),
        required_tolerance=float((error / (1 + np.abs(expected))).max()),
        outside=int((error > tolerance.allowed_error(expected)).sum()),
        nonfinite=int((~finite).sum()),
    )


def find_flips(reference: Logits, artifact: Logits, tolerance: Tolerance) -> Flips:
    """Return the images whose argmax differs between the two.

    A flip is forgiven if, in the reference, the logits of the two classes are closer together than the tolerance of
    the larger one: rounding alone then decides which class wins. Without a bound on the logits no flip is forgiven,
    and neither is one with a logit that is NaN or Inf.

    Args:
        reference, artifact: logits, (N, classes).
        tolerance: the tolerance that forgives.
    """
    positions = np.flatnonzero(reference.argmax(1) != artifact.argmax(1))
    finite = np.isfinite(reference[positions]) & np.isfinite(artifact[positions])
    forgiven: NDArray[np.bool_] = np.logical_and.reduce(finite, axis=1)
    rows = positions[forgiven]
    expected = reference[rows].astype(np.float64)
    best = expected.max(axis=1)
    margin = best - expected[np.arange(len(rows)), artifact[rows].argmax(1)]
    forgiven[forgiven] = tolerance.bounds_logits & (margin <= tolerance.allowed_error(best))
    return Flips(positions, forgiven)
