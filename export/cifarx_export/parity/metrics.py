"""Error statistics and flips of the prediction between two sets of logits for the same images."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.predictions import decision_boundaries, predictions_differ
from cifarx_export.parity.tolerances import Tolerance
from cifarx_serve.scores import applicable_labels
from cifarx_serve.spec import ModelSpec

Logits = NDArray[np.float32]
"""What a model returns, (N, output size): logits, or probabilities if its spec says so."""


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
    """Images with another prediction: their positions, and whether each flip is forgiven."""

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


def find_flips(reference: Logits, artifact: Logits, tolerance: Tolerance, spec: ModelSpec | None = None) -> Flips:
    """Return the images for which the two predict another class, or another set of labels.

    A flip is forgiven if, in the reference, the logits of the two classes are closer together than the tolerance of
    the larger one, or the logit of every label that differs is closer to its threshold than its tolerance: rounding
    alone then decides. Without a bound on the logits no flip is forgiven, and neither is one with a logit that is NaN
    or Inf.

    Args:
        reference, artifact: logits, (N, output size).
        tolerance: the tolerance that forgives.
        spec: how the logits become predictions; None for the class with the largest one.
    """
    positions = np.flatnonzero(predictions_differ(reference, artifact, spec))
    finite = np.isfinite(reference[positions]) & np.isfinite(artifact[positions])
    forgiven: NDArray[np.bool_] = np.logical_and.reduce(finite, axis=1)
    rows = positions[forgiven]
    if spec is None or spec.activation == "softmax":
        within = _classes_within(reference[rows], artifact[rows], tolerance)
    else:
        within = _labels_within(reference[rows], artifact[rows], tolerance, spec)
    forgiven[forgiven] = tolerance.bounds_logits & within
    return Flips(positions, forgiven)


def _classes_within(reference: Logits, artifact: Logits, tolerance: Tolerance) -> NDArray[np.bool_]:
    """Return for each flipped image whether the two classes are within the tolerance in the reference."""
    expected = reference.astype(np.float64)
    best = expected.max(axis=1)
    margin = best - expected[np.arange(len(expected)), artifact.argmax(1)]
    within: NDArray[np.bool_] = margin <= tolerance.allowed_error(best)
    return within


def _labels_within(reference: Logits, artifact: Logits, tolerance: Tolerance, spec: ModelSpec) -> NDArray[np.bool_]:
    """Return for each flipped image whether all labels that differ are within the tolerance of their threshold."""
    expected = reference.astype(np.float64)
    within: NDArray[np.bool_] = np.abs(expected - decision_boundaries(spec)) <= tolerance.allowed_error(expected)
    if spec.multi_label:
        within |= applicable_labels(reference, spec) == applicable_labels(artifact, spec)
    every_label: NDArray[np.bool_] = np.logical_and.reduce(within, axis=1)
    return every_label
