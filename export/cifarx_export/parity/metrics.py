"""The numbers of a proof: two sets of logits for the same images."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.tolerances import Tolerance

Logits = NDArray[np.float32]


class Errors(NamedTuple):
    """Of all logits: absolute errors, the tolerance t that `t + t * |reference|` would need, and NaN or Inf.

    Errors are over the logits that are finite on both sides; `nonfinite` counts the others.
    """

    max_abs: float
    mean_abs: float
    p999_abs: float
    required_tolerance: float
    outside: int
    nonfinite: int


class Flips(NamedTuple):
    """Images whose argmax differs: their positions, and which of them are forgiven."""

    positions: NDArray[np.int64]
    forgiven: NDArray[np.bool_]


def compare(reference: Logits, artifact: Logits, gate: Tolerance) -> Errors:
    """Errors of the artifact's logits, both (N, classes), N at least 1."""
    finite = np.isfinite(reference) & np.isfinite(artifact)
    expected = reference.astype(np.float64)[finite]
    error = np.abs(artifact.astype(np.float64)[finite] - expected)
    if not error.size:
        return Errors(np.inf, np.inf, np.inf, np.inf, artifact.size, artifact.size)
    return Errors(
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        p999_abs=float(np.percentile(error, 99.9)),
        required_tolerance=float((error / (1 + np.abs(expected))).max()),
        outside=int((error > gate.allowed(expected)).sum()),
        nonfinite=int((~finite).sum()),
    )


def find_flips(reference: Logits, artifact: Logits, gate: Tolerance) -> Flips:
    """Where the argmax of the two differs, both (N, classes).

    Forgiven where the reference's best logit and its logit of the artifact's answer lie closer together than the
    tolerance of the best: either answer is then the reference's own. Without a tolerance nothing is forgiven.
    """
    positions = np.flatnonzero(reference.argmax(1) != artifact.argmax(1))
    finite = np.isfinite(reference[positions]) & np.isfinite(artifact[positions])
    forgiven: NDArray[np.bool_] = np.logical_and.reduce(finite, axis=1)
    rows = positions[forgiven]
    expected = reference[rows].astype(np.float64)
    best = expected.max(axis=1)
    margin = best - expected[np.arange(len(rows)), artifact[rows].argmax(1)]
    forgiven[forgiven] = gate.has_tolerance & (margin <= gate.allowed(best))
    return Flips(positions, forgiven)
