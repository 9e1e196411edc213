"""What lies behind the figures of a proof: how the errors are spread, which classes differ, and the worst images."""

from collections.abc import Iterator
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.metrics import Logits

LOWEST_EXPONENT: Final = -10
HIGHEST_EXPONENT: Final = 2
BINS_A_DECADE: Final = 4

WORST_IMAGES: Final = 8
MOST_DISAGREEMENTS: Final = 100
"""Kinds of disagreement that are kept: all of ten classes' ninety."""

_CHUNK_LOGITS: Final = 1 << 20
"""As many errors are in memory at once, in double precision."""


class Histogram(msgspec.Struct, frozen=True):
    """Absolute errors of logits, counted by their decimal logarithm in bins of equal width.

    Attributes:
        lowest: the exponent where the first bin begins; smaller errors are in the first bin too.
        highest: the exponent where the last bin ends; larger errors are in the last bin too.
        counts: of each bin.
        zero: logits that are the same to the last bit, in no bin.
        nonfinite: logits that are NaN or Inf on either side, in no bin.
    """

    lowest: float
    highest: float
    counts: tuple[int, ...]
    zero: int
    nonfinite: int


class ClassAgreement(msgspec.Struct, frozen=True):
    """Images that the reference gives one class, and those of them that the artifact gives the same."""

    images: int
    agreeing: int


class Disagreement(msgspec.Struct, frozen=True):
    """So many images are class `reference` to the reference and class `artifact` to the artifact, by index."""

    reference: int
    artifact: int
    count: int


class WorstImage(msgspec.Struct, frozen=True):
    """An image by its position in the data, its label where the data has the model's classes, and both logits.

    A logit that is not finite is None, as JSON has it; `error` is the largest of a logit, None where one is not finite.
    The answers are the classes of the largest logit.
    """

    image: int
    label: int | None
    reference_answer: int
    artifact_answer: int
    reference: tuple[float | None, ...]
    artifact: tuple[float | None, ...]
    error: float | None

    @property
    def flipped(self) -> bool:
        return self.reference_answer != self.artifact_answer


class ErrorAnalysis(msgspec.Struct, frozen=True):
    """Of every image of the data, once: where batch sizes differ, by its worst answer.

    Attributes:
        class_names: what every index here means.
        histogram: of the errors of all logits.
        by_class: one for each class, in their order.
        disagreements: the `MOST_DISAGREEMENTS` most frequent, most frequent first.
        worst: at most `WORST_IMAGES`: first those whose answer differs, then by the largest error of a logit.
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
) -> ErrorAnalysis:
    """ErrorAnalysis of N images of C classes.

    Args:
        class_names: C of them, in label order.
        positions: of the images in the data, (N,).
        labels: of these images, (N,), or None where the data's classes are not the model's.
        reference, artifact: logits, (N, C), N at least 1.
    """
    expected, found = reference.argmax(1), artifact.argmax(1)
    errors = row_errors(reference, artifact)
    severity = np.lexsort((-errors, expected == found))
    return ErrorAnalysis(
        class_names,
        error_histogram(reference, artifact),
        _by_class(expected, found, len(class_names)),
        _disagreements(expected, found, len(class_names)),
        tuple(
            WorstImage(
                int(positions[row]),
                None if labels is None else int(labels[row]),
                int(expected[row]),
                int(found[row]),
                _numbers(reference[row]),
                _numbers(artifact[row]),
                float(errors[row]) if np.isfinite(errors[row]) else None,
            )
            for row in severity[:WORST_IMAGES]
        ),
    )


def row_errors(reference: Logits, artifact: Logits) -> NDArray[np.float64]:
    """The largest error of each image, (N,), of logits (N, C); Inf where a logit is not finite."""
    return np.concatenate([error.max(axis=1) for error in _errors(reference, artifact)])


def error_histogram(reference: Logits, artifact: Logits) -> Histogram:
    """The absolute errors of logits, both (N, C), N at least 1."""
    bins = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_A_DECADE
    counts = np.zeros(bins, np.int64)
    zero = nonfinite = 0
    for error in _errors(reference, artifact):
        zero += int((error == 0).sum())
        nonfinite += int(np.isinf(error).sum())
        exponents = np.log10(error[(error > 0) & np.isfinite(error)])
        places = np.floor((exponents - LOWEST_EXPONENT) * BINS_A_DECADE).astype(np.int64)
        counts += np.bincount(places.clip(0, bins - 1), minlength=bins)
    return Histogram(LOWEST_EXPONENT, HIGHEST_EXPONENT, tuple(map(int, counts)), zero, nonfinite)


def _errors(reference: Logits, artifact: Logits) -> Iterator[NDArray[np.float64]]:
    """Absolute errors of some rows at a time, (n, C); Inf where either side is not finite."""
    step = max(1, _CHUNK_LOGITS // reference.shape[1])
    for start in range(0, len(reference), step):
        rows = slice(start, start + step)
        with np.errstate(invalid="ignore"):  # Inf of both gives NaN, which is as bad
            error = np.abs(artifact[rows].astype(np.float64) - reference[rows])
        yield np.where(np.isfinite(error), error, np.inf)


def _by_class(expected: NDArray[np.int64], found: NDArray[np.int64], classes: int) -> tuple[ClassAgreement, ...]:
    images = np.bincount(expected, minlength=classes)
    agreeing = np.bincount(expected[expected == found], minlength=classes)
    return tuple(ClassAgreement(int(all_), int(same)) for all_, same in zip(images, agreeing, strict=True))


def _disagreements(expected: NDArray[np.int64], found: NDArray[np.int64], classes: int) -> tuple[Disagreement, ...]:
    flipped = expected != found
    pairs, counts = np.unique(expected[flipped] * classes + found[flipped], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_DISAGREEMENTS]
    return tuple(Disagreement(*divmod(int(pairs[place]), classes), int(counts[place])) for place in order)


def _numbers(logits: NDArray[np.float32]) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in logits)
