"""The verdict on an artifact's answers: what they are measured by, and whether each figure holds to the gate."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.error_analysis import row_errors
from cifarx_export.parity.metrics import Errors, Logits, compare, find_flips
from cifarx_export.parity.tolerances import Tolerance

_ROUNDING = 1e-12
"""What a share of the images may be off by for having been divided."""


class Check(msgspec.Struct, frozen=True):
    """One thing that was checked, and what was found."""

    name: str
    passed: bool
    found: str


class Answers(NamedTuple):
    """Logits of both for the images of one batch size; `positions` says which images, empty for edge inputs."""

    positions: NDArray[np.int64]
    reference: Logits
    artifact: Logits


class Figures(NamedTuple):
    """What was measured; `errors` is None where the artifact gave no answer, an accuracy where there is none.

    Attributes:
        images: of the data.
        errors: of all logits at every batch size, edge inputs among them.
        agreement: the share of the images that have the reference's argmax at every batch size.
        forgiven: how many of the others are forgiven.
        reference_accuracy: of the reference.
        accuracy: of the artifact, where every image had an answer.
    """

    images: int
    errors: Errors | None
    agreement: float
    forgiven: int
    reference_accuracy: float | None
    accuracy: float | None


def measure(
    answers: Sequence[Answers],
    edge: Answers | None,
    expected: Logits,
    labels: NDArray[np.int64] | None,
    gate: Tolerance,
) -> Figures:
    """The figures of an artifact.

    Args:
        answers: at each batch size that ran.
        edge: to the edge inputs, where they ran.
        expected: the reference's logits for all images, (N, classes).
        labels: (N,), or None where the data's classes are not the model's.
        gate: what is forgiven.
    """
    images = len(expected)
    whole = next((part for part in answers if len(part.positions) == images), None)
    agreement, forgiven = _agreement(answers, images, gate) if answers else (0.0, 0)
    return Figures(
        images,
        _errors(answers if edge is None else [*answers, edge], gate) if answers else None,
        agreement,
        forgiven,
        _accuracy(expected, labels),
        _accuracy(whole.artifact, labels) if whole else None,
    )


def judge(figures: Figures, gate: Tolerance) -> list[Check]:
    """Whether the figures hold to the gate; of an artifact that gave no answer there is nothing to judge."""
    if figures.errors is None:
        return []
    errors = figures.errors
    return [
        Check("finite", errors.nonfinite == 0, f"{errors.nonfinite} NaN or Inf"),
        *_judge_tolerance(errors, gate),
        _judge_agreement(figures, gate),
        *_judge_accuracy(figures, gate),
    ]


def worst_of_each(answers: Sequence[Answers]) -> Answers:
    """Every image that had an answer, once: where batch sizes differ, a flipped answer, then the largest error.

    `answers` has at least one; its positions come out in their order.
    """
    positions = np.concatenate([part.positions for part in answers])
    reference = np.concatenate([part.reference for part in answers])
    artifact = np.concatenate([part.artifact for part in answers])
    agrees = reference.argmax(1) == artifact.argmax(1)
    order = np.lexsort((-row_errors(reference, artifact), agrees, positions))
    _, first = np.unique(positions[order], return_index=True)
    rows = order[first]
    return Answers(positions[rows], reference[rows], artifact[rows])


def _errors(answers: Sequence[Answers], gate: Tolerance) -> Errors:
    return compare(
        np.concatenate([part.reference for part in answers]), np.concatenate([part.artifact for part in answers]), gate
    )


def _agreement(answers: Sequence[Answers], images: int, gate: Tolerance) -> tuple[float, int]:
    """The share of the images that never flip, and how many of the flipped are forgiven at every batch size."""
    flipped = np.zeros(images, np.bool_)
    unforgiven = np.zeros(images, np.bool_)
    for part in answers:
        flips = find_flips(part.reference, part.artifact, gate)
        flipped[part.positions[flips.positions]] = True
        unforgiven[part.positions[flips.positions[~flips.forgiven]]] = True
    return 1 - float(flipped.mean()), int((flipped & ~unforgiven).sum())


def _accuracy(logits: Logits, labels: NDArray[np.int64] | None) -> float | None:
    return None if labels is None else float((logits.argmax(1) == labels).mean())


def _judge_tolerance(errors: Errors, gate: Tolerance) -> list[Check]:
    """Of precisions that have a tolerance."""
    if not gate.has_tolerance:
        return []
    found = f"max |Δ| {errors.max_abs:.2e}, {errors.outside} outside {gate.atol or 0:g} + {gate.rtol or 0:g}·|ref|"
    return [Check("tolerance", errors.outside == 0, found)]


def _judge_agreement(figures: Figures, gate: Tolerance) -> Check:
    forgiven = f", {figures.forgiven} forgiven" if figures.forgiven else ""
    return Check(
        "agreement",
        figures.agreement + figures.forgiven / figures.images >= gate.agreement - _ROUNDING,
        f"{figures.agreement:.4%} of {figures.images} images{forgiven} (at least {gate.agreement:.4g})",
    )


def _judge_accuracy(figures: Figures, gate: Tolerance) -> list[Check]:
    """Of precisions that have a budget, on images whose classes are the model's."""
    before, after, budget = figures.reference_accuracy, figures.accuracy, gate.accuracy_drop
    if budget is None or before is None or after is None:
        return []
    found = f"{after:.2%}, {(after - before) * 100:+.2f} points (at least {-budget * 100:+.2f})"
    return [Check("accuracy", before - after <= budget + _ROUNDING, found)]
