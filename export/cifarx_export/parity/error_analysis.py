"""Analyze the errors of an artifact: their distribution, the classes that disagree, and the worst images."""

from collections.abc import Iterator
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.metrics import Logits
from cifarx_export.parity.predictions import best_classes, predictions_differ
from cifarx_serve.scores import applicable_labels
from cifarx_serve.spec import ModelSpec

LOWEST_EXPONENT: Final = -10
HIGHEST_EXPONENT: Final = 2
BINS_PER_DECADE: Final = 4
"""The bins of the histogram: four per power of ten, from 1e-10 to 1e2."""

MAX_WORST_IMAGES: Final = 8
"""Number of worst images to keep."""

MAX_DISAGREEMENTS: Final = 100
"""Number of (reference class, artifact class) pairs to keep; ten classes have 90."""

_CHUNK_LOGITS: Final = 1 << 20
"""Number of errors held in memory at once, in float64."""


class Histogram(msgspec.Struct, frozen=True):
    """Histogram of the absolute errors of logits, with bins of equal width in log10(error).

    Attributes:
        lowest: log10 of the lower edge of the first bin, which also counts smaller errors.
        highest: log10 of the upper edge of the last bin, which also counts larger errors.
        counts: number of logits in each bin.
        zero: number of logits with no error; they are in no bin.
        nonfinite: number of logits that are NaN or Inf on either side; they are in no bin.
    """

    lowest: float
    highest: float
    counts: tuple[int, ...]
    zero: int
    nonfinite: int


class ClassAgreement(msgspec.Struct, frozen=True):
    """Number of images the reference predicts as one class, and of those the artifact predicts as the same class.

    Where several labels can apply to an image, it counts for each of them.
    """

    images: int
    agreeing: int


class Disagreement(msgspec.Struct, frozen=True):
    """Number of images predicted as class `reference` by the reference and class `artifact` by the artifact."""

    reference: int
    artifact: int
    count: int


class WorstImage(msgspec.Struct, frozen=True):
    """One of the images with the worst errors.

    Attributes:
        image: position of the image in the data.
        label: its label, or None if the classes of the data are not the model's.
        reference_prediction, artifact_prediction: the index of the best class.
        reference, artifact: the logits, one per output; None for a logit that is NaN or Inf.
        error: largest absolute error of a logit; None if a logit is NaN or Inf.
        flipped: whether the predictions differ: the best class, or the set of labels where several can apply.
    """

    image: int
    label: int | None
    reference_prediction: int = msgspec.field(name="reference_answer")
    artifact_prediction: int = msgspec.field(name="artifact_answer")
    reference: tuple[float | None, ...]
    artifact: tuple[float | None, ...]
    error: float | None
    flipped: bool


class ErrorAnalysis(msgspec.Struct, frozen=True):
    """Error analysis over the images of the data, with one row of logits per image.

    Attributes:
        class_names: class names, in label order.
        histogram: histogram of the errors of all logits.
        by_class: agreement for each class, in label order.
        disagreements: the most frequent disagreements, most frequent first, at most `MAX_DISAGREEMENTS`; none where
            several labels can apply to an image.
        worst: the worst images, at most `MAX_WORST_IMAGES`: flips first, then by the largest error of a logit.
    """

    class_names: tuple[str, ...]
    histogram: Histogram
    by_class: tuple[ClassAgreement, ...]
    disagreements: tuple[Disagreement, ...]
    worst: tuple[WorstImage, ...]


def analyze_errors(
    class_names: tuple[str, ...],
    positions: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    reference: Logits,
    artifact: Logits,
    spec: ModelSpec | None = None,
) -> ErrorAnalysis:
    """Analyze the errors of N images and C classes.

    Args:
        class_names: the C class names, in label order.
        positions: positions of the images in the data, (N,).
        labels: labels of these images, (N,); None if the classes of the data are not the model's.
        reference, artifact: logits, (N, output size), N at least 1.
        spec: how the logits become predictions; None for the class with the largest one.
    """
    expected, found = best_classes(reference, spec), best_classes(artifact, spec)
    flipped = predictions_differ(reference, artifact, spec)
    errors = max_error_per_image(reference, artifact)
    severity = np.lexsort((-errors, ~flipped))
    return ErrorAnalysis(
        class_names,
        error_histogram(reference, artifact),
        _by_label(applicable_labels(reference, spec), applicable_labels(artifact, spec))
        if spec is not None and spec.multi_label
        else _by_class(expected, found, len(class_names)),
        () if spec is not None and spec.multi_label else _disagreements(expected, found, len(class_names)),
        tuple(
            WorstImage(
                image=int(positions[row]),
                label=None if labels is None else int(labels[row]),
                reference_prediction=int(expected[row]),
                artifact_prediction=int(found[row]),
                reference=_finite_or_none(reference[row]),
                artifact=_finite_or_none(artifact[row]),
                error=float(errors[row]) if np.isfinite(errors[row]) else None,
                flipped=bool(flipped[row]),
            )
            for row in severity[:MAX_WORST_IMAGES]
        ),
    )


def max_error_per_image(reference: Logits, artifact: Logits) -> NDArray[np.float64]:
    """Return the largest error of each image, (N,), from logits (N, C); Inf if a logit is not finite."""
    return np.concatenate([error.max(axis=1) for error in _absolute_errors(reference, artifact)])


def error_histogram(reference: Logits, artifact: Logits) -> Histogram:
    """Return the histogram of the absolute errors of logits, both (N, C), N at least 1."""
    bins = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_DECADE
    counts = np.zeros(bins, np.int64)
    zero = nonfinite = 0
    for error in _absolute_errors(reference, artifact):
        zero += int((error == 0).sum())
        nonfinite += int(np.isinf(error).sum())
        exponents = np.log10(error[(error > 0) & np.isfinite(error)])
        bin_indices = np.floor((exponents - LOWEST_EXPONENT) * BINS_PER_DECADE).astype(np.int64)
        counts += np.bincount(bin_indices.clip(0, bins - 1), minlength=bins)
    return Histogram(LOWEST_EXPONENT, HIGHEST_EXPONENT, tuple(map(int, counts)), zero, nonfinite)


def _absolute_errors(reference: Logits, artifact: Logits) -> Iterator[NDArray[np.float64]]:
    """Yield the absolute errors of some rows at a time, (n, C); Inf where either side is not finite."""
    step = max(1, _CHUNK_LOGITS // reference.shape[1])
    for start in range(0, len(reference), step):
        rows = slice(start, start + step)
        with np.errstate(invalid="ignore"):  # Inf - Inf is NaN, which becomes Inf below
            error = np.abs(artifact[rows].astype(np.float64) - reference[rows])
        yield np.where(np.isfinite(error), error, np.inf)


def _by_class(expected: NDArray[np.int64], found: NDArray[np.int64], classes: int) -> tuple[ClassAgreement, ...]:
    images = np.bincount(expected, minlength=classes)
    agreeing = np.bincount(expected[expected == found], minlength=classes)
    return tuple(ClassAgreement(int(total), int(same)) for total, same in zip(images, agreeing, strict=True))


def _by_label(expected: NDArray[np.bool_], found: NDArray[np.bool_]) -> tuple[ClassAgreement, ...]:
    images, agreeing = expected.sum(axis=0), (expected & found).sum(axis=0)
    return tuple(ClassAgreement(int(total), int(same)) for total, same in zip(images, agreeing, strict=True))


def _disagreements(expected: NDArray[np.int64], found: NDArray[np.int64], classes: int) -> tuple[Disagreement, ...]:
    flipped = expected != found
    pairs, counts = np.unique(expected[flipped] * classes + found[flipped], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_DISAGREEMENTS]
    return tuple(Disagreement(*divmod(int(pairs[index]), classes), int(counts[index])) for index in order)


def _finite_or_none(logits: NDArray[np.float32]) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in logits)
