"""The checks of the parity check: compute the metrics of an artifact's logits and compare them with the tolerance."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.error_analysis import max_error_per_image
from cifarx_export.parity.metrics import LogitErrors, Logits, compute_errors, find_flips
from cifarx_export.parity.predictions import best_classes, predictions_differ
from cifarx_export.parity.tolerances import Tolerance
from cifarx_serve.spec import ModelSpec
from cifarx_train import binomial

_ROUNDING = 1e-12
"""Slack for the floating-point rounding of a share."""


class Check(msgspec.Struct, frozen=True):
    """One check of the parity check.

    Attributes:
        name: the name of the check.
        passed: whether the artifact and the reference agree.
        found: what was found, as text.
        assumed: whether both agree only on what nobody stated, so that there is nothing to check against.
    """

    name: str
    passed: bool
    found: str
    assumed: bool = False


class PairedLogits(NamedTuple):
    """The logits of the reference and of the artifact for the same N images.

    Attributes:
        positions: positions of the images in the data, (N,); empty for edge inputs, which are not in the data.
        reference, artifact: logits, (N, output size).
    """

    positions: NDArray[np.int64]
    reference: Logits
    artifact: Logits


class ParityMetrics(NamedTuple):
    """The metrics of one artifact.

    Attributes:
        images: number of images in the data.
        errors: errors of all logits at every batch size, including edge inputs; None if no batch size ran.
        agreement: share of the images whose prediction is the reference's at every batch size.
        agreement_bound: lower bound of the agreement on images like these, with 95% confidence.
        forgiven: number of the other images whose flips are all forgiven.
        reference_accuracy: accuracy of the reference; None without labels.
        accuracy: accuracy of the artifact; None without labels, or if not every image has logits.
    """

    images: int
    errors: LogitErrors | None
    agreement: float
    agreement_bound: float
    forgiven: int
    reference_accuracy: float | None
    accuracy: float | None


def compute_metrics(
    pairs: Sequence[PairedLogits],
    edges: Sequence[PairedLogits],
    reference: Logits,
    labels: NDArray[np.int64] | None,
    tolerance: Tolerance,
    spec: ModelSpec | None = None,
) -> ParityMetrics:
    """Return the metrics of an artifact.

    Args:
        pairs: logits of each batch size that ran.
        edges: logits of the edge inputs, where they ran.
        reference: the reference's logits for all images, (N, output size).
        labels: labels of the first images, on which the accuracy is measured, (n,) with n <= N; None if the classes of
            the data are not the model's.
        tolerance: the tolerance for logits and forgiven flips.
        spec: how the logits become predictions; None for the class with the largest one.
    """
    images = len(reference)
    whole = next((pair for pair in pairs if len(pair.positions) == images), None)
    flipped, unforgiven = _flipped_images(pairs, images, tolerance, spec)
    agreeing = images - int(flipped.sum())
    return ParityMetrics(
        images,
        _errors([*pairs, *edges], tolerance) if pairs else None,
        agreeing / images,
        binomial.lower_bound(agreeing, images),
        int((flipped & ~unforgiven).sum()),
        _accuracy(reference, labels, spec),
        _accuracy(whole.artifact, labels, spec) if whole else None,
    )


def check_metrics(metrics: ParityMetrics, tolerance: Tolerance, output: str = "logits") -> list[Check]:
    """Compare the metrics with the tolerance; return no checks if the artifact returned no logits.

    Args:
        metrics: from `compute_metrics`.
        tolerance: the tolerance of the artifact's precision.
        output: what the model returns, `logits` or `probabilities`.
    """
    if metrics.errors is None:
        return []
    errors = metrics.errors
    return [
        Check("finite", errors.nonfinite == 0, f"{errors.nonfinite} NaN or Inf {output}"),
        *_check_logits(errors, tolerance, output),
        _check_agreement(metrics, tolerance),
        *_check_accuracy(metrics, tolerance),
    ]


def worst_per_image(pairs: Sequence[PairedLogits], spec: ModelSpec | None = None) -> PairedLogits:
    """Return one row for each image: if batch sizes differ, a row with a flip, then the one with the largest error.

    Args:
        pairs: at least one.
        spec: how the logits become predictions; None for the class with the largest one.

    Returns:
        The rows in ascending order of position.
    """
    positions = np.concatenate([pair.positions for pair in pairs])
    reference = np.concatenate([pair.reference for pair in pairs])
    artifact = np.concatenate([pair.artifact for pair in pairs])
    agrees = ~predictions_differ(reference, artifact, spec)
    order = np.lexsort((-max_error_per_image(reference, artifact), agrees, positions))
    _, first = np.unique(positions[order], return_index=True)
    rows = order[first]
    return PairedLogits(positions[rows], reference[rows], artifact[rows])


def _errors(pairs: Sequence[PairedLogits], tolerance: Tolerance) -> LogitErrors:
    return compute_errors(
        np.concatenate([pair.reference for pair in pairs]), np.concatenate([pair.artifact for pair in pairs]), tolerance
    )


def _flipped_images(
    pairs: Sequence[PairedLogits], images: int, tolerance: Tolerance, spec: ModelSpec | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which images flip at any batch size, and which of them are not forgiven, both (N,)."""
    flipped = np.full(images, not pairs)
    unforgiven = flipped.copy()
    for pair in pairs:
        flips = find_flips(pair.reference, pair.artifact, tolerance, spec)
        flipped[pair.positions[flips.positions]] = True
        unforgiven[pair.positions[flips.positions[~flips.forgiven]]] = True
    return flipped, unforgiven


def _accuracy(logits: Logits, labels: NDArray[np.int64] | None, spec: ModelSpec | None) -> float | None:
    return None if labels is None else float((best_classes(logits[: len(labels)], spec) == labels).mean())


def _check_logits(errors: LogitErrors, tolerance: Tolerance, output: str) -> list[Check]:
    """Check every logit, for precisions whose tolerance bounds them."""
    if not tolerance.bounds_logits:
        return []
    bound = f"{tolerance.atol or 0:g} + {tolerance.rtol or 0:g}·|ref|"
    return [
        Check(
            "tolerance", errors.outside == 0, f"max |Δ| {errors.max_abs:.2e}, {errors.outside} {output} outside {bound}"
        )
    ]


def _check_agreement(metrics: ParityMetrics, tolerance: Tolerance) -> Check:
    flips = "flip" if metrics.forgiven == 1 else "flips"
    forgiven = f", {metrics.forgiven} {flips} forgiven" if metrics.forgiven else ""
    return Check(
        "agreement",
        metrics.agreement + metrics.forgiven / metrics.images >= tolerance.agreement - _ROUNDING,
        f"{metrics.agreement:.4%} of {metrics.images} images{forgiven} (minimum {tolerance.agreement * 100:g}%); "
        f"at least {binomial.floor_percent(metrics.agreement_bound)} with {binomial.CONFIDENCE:.0%} confidence",
    )


def _check_accuracy(metrics: ParityMetrics, tolerance: Tolerance) -> list[Check]:
    """Check the accuracy, for precisions with a bound on its loss and data with the model's classes."""
    before, after, drop = metrics.reference_accuracy, metrics.accuracy, tolerance.accuracy_drop
    if drop is None or before is None or after is None:
        return []
    found = f"{after:.2%}, a change of {(after - before) * 100:+.2f} points (minimum {-drop * 100:+.2f})"
    return [Check("accuracy", before - after <= drop + _ROUNDING, found)]
