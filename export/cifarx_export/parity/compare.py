"""The parity check: run an artifact and its reference on the same images and compare their logits.

The artifact runs in the backend that will serve it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.checks import (
    Check,
    PairedLogits,
    ParityMetrics,
    check_metrics,
    compute_metrics,
    worst_per_image,
)
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.error_analysis import ErrorAnalysis, analyze_errors
from cifarx_export.parity.metrics import Logits, compute_errors, find_flips
from cifarx_export.parity.resize import check_resize
from cifarx_export.parity.spec_checks import check_interface, check_specs
from cifarx_export.parity.tolerances import Tolerance, get_tolerance
from cifarx_serve.backends.base import Backend
from cifarx_serve.errors import DeviceMemoryError, UsageError, error_message
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.prediction_counts import count_predictions
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec, ModelSpec, ParitySummary
from cifarx_train.data.dataset import evenly_spaced

EVAL_BATCH_SIZE: Final = 64
"""Batch size at which every image is run."""

BATCH_SIZES: Final = (1, 3, EVAL_BATCH_SIZE)
"""Default batch sizes of the check: one image, an odd number, and many."""

SUBSET_IMAGES: Final = 1000
"""Number of images, evenly spaced over the split, that are run at each of the other batch sizes."""

_EDGE_INPUTS: Final = 3
_RATE_DIGITS: Final = 6


class ParityResult(msgspec.Struct, frozen=True):
    """The result of a parity check.

    Attributes:
        checks: every check, in order.
        summary: the part that is stored inside the artifact.
        error_analysis: None if the artifact returned no logits.
    """

    checks: tuple[Check, ...]
    summary: ParitySummary
    error_analysis: ErrorAnalysis | None

    @property
    def passed(self) -> bool:
        return self.summary.passed

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    def renamed(self, path: Path, name: str) -> "ParityResult":
        """Return the result with a name where errors of the runtime name a temporary file."""
        checks = (msgspec.structs.replace(check, found=check.found.replace(str(path), name)) for check in self.checks)
        return msgspec.structs.replace(self, checks=tuple(checks))

    def with_warning(self, warning: str) -> "ParityResult":
        """Return the result with another warning."""
        summary = msgspec.structs.replace(self.summary, warnings=(*self.summary.warnings, warning))
        return msgspec.structs.replace(self, summary=summary)

    def with_checks(self, checks: Sequence[Check]) -> "ParityResult":
        """Return the result with other checks in front of its own. All of them have to pass."""
        passed = self.passed and all(check.passed for check in checks)
        summary = msgspec.structs.replace(self.summary, passed=passed)
        return msgspec.structs.replace(self, checks=(*checks, *self.checks), summary=summary)


class OutputShapeError(Exception):
    """Raised when a backend returns something else than logits of the right shape. The message names both."""


class Reference(NamedTuple):
    """The reference and its logits, computed once for any number of artifacts.

    Attributes:
        name: name of its backend.
        spec: its model spec.
        data: the images of the check.
        logits: logits of these images in batches of `EVAL_BATCH_SIZE`, (N, output size).
        single_logits: logits of the images that are run at batch 1; the other rows are those of `logits`.
        edge_logits: logits of the edge inputs as one batch, (edge inputs, output size).
        single_edge_logits: logits of the edge inputs one by one.
    """

    name: str
    spec: ModelSpec
    data: ParityData
    logits: Logits
    single_logits: Logits
    edge_logits: Logits
    single_edge_logits: Logits


def run_reference(backend: Backend, data: ParityData, progress: Progress = silent) -> Reference:
    """Run the reference on every image and on the edge inputs, together and one by one.

    A network can depend on the batch: its branches on the values of a batch are lost when it is traced.

    Raises:
        OutputShapeError: the reference does not return what its spec describes.
    """
    images = data.images
    progress(f"reference: running {data.describe()} with {backend.name} ({backend.provider})")
    logits = _run(backend, images, np.arange(len(images)), EVAL_BATCH_SIZE)
    single_logits, positions = logits.copy(), _positions(len(images), 1)
    single_logits[positions] = _run(backend, images, positions, 1)
    edge_logits, single_edge_logits = (_run_edges(backend, size) for size in (_EDGE_INPUTS, 1))
    return Reference(backend.name, backend.spec, data, logits, single_logits, edge_logits, single_edge_logits)


def reference_batches(
    reference: Reference, count: int, spec: ModelSpec
) -> Iterator[tuple[NDArray[Any], NDArray[np.float32]]]:
    """Yield the edge inputs, and up to `count` images spread evenly over the data, with the logits of the reference.

    Args:
        reference: from `run_reference`.
        count: number of images.
        spec: spec of the model that takes the images, in batches of at most `EVAL_BATCH_SIZE`.
    """
    yield model_input(_edge_images(spec.input), spec), reference.edge_logits
    positions = evenly_spaced(len(reference.data.images), count)
    for start in range(0, len(positions), EVAL_BATCH_SIZE):
        batch = positions[start : start + EVAL_BATCH_SIZE]
        yield model_input(reference.data.images[batch], spec), reference.logits[batch]


def parity_batch_sizes(extra: int | None, images: int) -> tuple[int, ...]:
    """Return the batch sizes of a parity check: the default ones, and `extra` if it is given.

    Raises:
        UsageError: `extra` is below 1, or above `EVAL_BATCH_SIZE` and the number of images.
    """
    if extra is None:
        return BATCH_SIZES
    largest = max(images, EVAL_BATCH_SIZE)
    if not 1 <= extra <= largest:
        raise UsageError(f"batch size {extra} is out of range", f"give 1 to {largest}, for {images} images")
    return tuple(sorted({*BATCH_SIZES, extra}))


def check_parity(
    reference: Reference,
    artifact: Backend,
    tolerance: Tolerance,
    progress: Progress = silent,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> ParityResult:
    """Check that an artifact returns the logits of its reference.

    Compares the specs and the interface first, then runs the artifact at every batch size and on the edge inputs and
    compares the logits: at batch 1 with those of the reference at batch 1, otherwise with those of its large batches.
    An artifact that fails to run is a failed check, not an exception.

    Args:
        reference: from `run_reference`.
        artifact: the opened artifact.
        tolerance: the tolerance of its precision.
        progress: called with a line about each step.
        batch_sizes: from `parity_batch_sizes`.
    """
    data, spec = reference.data, reference.spec
    checks = [
        *check_specs(spec, artifact.spec),
        *check_interface(artifact),
        *_check_reference(reference, tolerance),
    ]
    pairs: list[PairedLogits] = []
    for batch_size in batch_sizes:
        positions = _positions(len(data.images), batch_size)
        progress(f"artifact: running {len(positions)} images in batches of {batch_size} with {artifact.name}")
        expected = reference.single_logits if batch_size == 1 else reference.logits
        check, logits = _run_batches(artifact, data.images, positions, batch_size, expected.shape[1])
        checks.append(check)
        if logits is not None:
            pairs.append(PairedLogits(positions, expected[positions], logits))
    edge_check, edges = _run_edge_inputs(reference, artifact)
    resize_checks = check_resize(artifact, data.images[_positions(len(data.images), 1)])
    test_labels = None if data.labels is None else data.labels[: data.test_images]
    metrics = compute_metrics(pairs, edges, reference.logits, test_labels, tolerance, spec)
    checks += [edge_check, *resize_checks, *check_metrics(metrics, tolerance, spec.output)]
    passed = all(check.passed for check in checks)
    summary = _summary(metrics, passed, reference, artifact.provider, tolerance, batch_sizes)
    return ParityResult(tuple(checks), summary, _error_analysis(pairs, reference))


def _check_reference(reference: Reference, tolerance: Tolerance) -> list[Check]:
    """Check that the reference is fit for a comparison: finite, and independent of the other images of a batch."""
    if problem := _not_finite(reference):
        return [Check("reference", False, problem)]
    together, alone, spec = reference.logits, reference.single_logits, reference.spec
    if tolerance.bounds_logits:  # those of the user may be below the rounding errors of the reference
        tolerance = get_tolerance("fp32", output=spec.output)
    errors, flips = compute_errors(together, alone, tolerance), find_flips(together, alone, tolerance, spec)
    agreement = 1 - int((~flips.forgiven).sum()) / len(alone)
    passed = agreement >= tolerance.agreement and not (tolerance.bounds_logits and errors.outside)
    found = f"max |Δ| {errors.max_abs:.2e} between batch 1 and {EVAL_BATCH_SIZE} of the reference"
    if not passed:
        found = f"the reference depends on the other images of a batch: {found}, {len(flips.positions)} flips"
    return [Check("batch effects", passed, found)]


def _not_finite(reference: Reference) -> str:
    """Return for how many images the reference returns NaN or Inf, or nothing."""
    images = _not_finite_rows(reference.logits) | _not_finite_rows(reference.single_logits)
    edges = _not_finite_rows(reference.edge_logits) | _not_finite_rows(reference.single_edge_logits)
    if not images.any() and not edges.any():
        return ""
    nan = any(np.isnan(logits).any() for logits in (reference.logits, reference.edge_logits))
    counts = f"{images.sum():,} of {images.size:,} images and {edges.sum()} of {edges.size} edge inputs"
    return f"the reference returns {'NaN' if nan else 'Inf'} for {counts}: check its weights and its preprocessing"


def _not_finite_rows(logits: Logits) -> NDArray[np.bool_]:
    rows: NDArray[np.bool_] = ~np.logical_and.reduce(np.isfinite(logits), axis=1)
    return rows


def _positions(images: int, batch_size: int) -> NDArray[np.int64]:
    """Return the positions of the images that are run at this batch size."""
    if batch_size == EVAL_BATCH_SIZE:
        return np.arange(images)
    return evenly_spaced(images, max(SUBSET_IMAGES, batch_size))


def _run(backend: Backend, images: NDArray[np.uint8], positions: NDArray[np.int64], batch_size: int) -> Logits:
    """Return the logits of the images at these positions.

    Preprocesses one batch at a time: all images of ImageNet's size as float32 would take gigabytes. If there are too
    few images for one batch, they are repeated in it.

    Raises:
        OutputShapeError: a batch has logits of another dtype or shape than float32 (batch size, output size).
    """
    filled = positions if len(positions) >= batch_size else np.resize(positions, batch_size)
    batches = (filled[start : start + batch_size] for start in range(0, len(filled), batch_size))
    return np.concatenate([_run_batch(backend, images[batch]) for batch in batches])[: len(positions)]


def _run_batch(backend: Backend, images: NDArray[np.uint8]) -> Logits:
    logits = np.asarray(backend.run(model_input(images, backend.spec)))
    shape = (len(images), backend.spec.output_size)
    if logits.shape != shape or logits.dtype != np.float32:
        raise OutputShapeError(f"{logits.dtype} {logits.shape} instead of float32 {shape}")
    return logits


def _run_batches(
    artifact: Backend, images: NDArray[np.uint8], positions: NDArray[np.int64], batch_size: int, outputs: int
) -> tuple[Check, Logits | None]:
    name = f"batch {batch_size}"
    try:
        logits = _run(artifact, images, positions, batch_size)
    except DeviceMemoryError:
        raise
    except OutputShapeError as error:
        return Check(name, False, f"returns {error}"), None
    except Exception as error:  # the errors of the runtimes have no common base class
        return Check(name, False, f"does not run: {error_message(error)}"), None
    if logits.shape[1] != outputs:
        return Check(name, False, f"returns {logits.shape[1]} values per image instead of {outputs}"), None
    return Check(name, True, f"float32 (N, {outputs})"), logits


def _edge_images(spec: InputSpec) -> NDArray[np.uint8]:
    """Return a black, a white and a noise image: inputs that no photograph covers."""
    shape = (1, spec.height, spec.width, spec.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return np.concatenate([np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), noise])


def _run_edges(backend: Backend, batch_size: int) -> Logits:
    return _run(backend, _edge_images(backend.spec.input), np.arange(_EDGE_INPUTS), batch_size)


def _run_edge_inputs(reference: Reference, artifact: Backend) -> tuple[Check, list[PairedLogits]]:
    """Run the edge inputs as one batch and one by one: a batch can hide what a network does with one image."""
    pairs: list[PairedLogits] = []
    for batch_size, expected in ((_EDGE_INPUTS, reference.edge_logits), (1, reference.single_edge_logits)):
        images = _edge_images(reference.spec.input)
        check, logits = _run_batches(artifact, images, np.arange(_EDGE_INPUTS), batch_size, expected.shape[1])
        if logits is None:
            return Check("edge inputs", False, check.found if batch_size > 1 else f"one by one: {check.found}"), pairs
        pairs.append(PairedLogits(np.empty(0, np.int64), expected, logits))
    return Check("edge inputs", True, "black, white and noise, together and one by one"), pairs


def _summary(
    metrics: ParityMetrics,
    passed: bool,
    reference: Reference,
    provider: str,
    tolerance: Tolerance,
    batch_sizes: Sequence[int],
) -> ParitySummary:
    errors, data = metrics.errors, reference.data
    class_rates, score_rates = _prediction_rates(reference)
    return ParitySummary(
        passed=passed,
        images=metrics.images,
        batch_sizes=tuple(batch_sizes),
        max_abs_error=_finite_or_none(errors and errors.max_abs),
        mean_abs_error=_finite_or_none(errors and errors.mean_abs),
        p999_abs_error=_finite_or_none(errors and errors.p999_abs),
        required_tolerance=_finite_or_none(errors and errors.required_tolerance),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        agreement=metrics.agreement,
        forgiven=metrics.forgiven,
        reference_accuracy=metrics.reference_accuracy,
        accuracy=metrics.accuracy,
        nonfinite=errors.nonfinite if errors else 0,
        provider=provider,
        data=data.name,
        data_fingerprint=data.fingerprint,
        agreement_bound=metrics.agreement_bound,
        test_images=data.test_images,
        training_images=len(data.training_rows),
        warnings=data.warnings(),
        class_rates=class_rates,
        score_rates=score_rates,
    )


def _prediction_rates(reference: Reference) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return how often the reference predicts each class for a test image, and a score in each bin."""
    counts = count_predictions(reference.logits[: reference.data.test_images], reference.spec)
    if not counts.images:
        return None, None
    rates = (np.round(numbers / counts.images, _RATE_DIGITS) for numbers in (counts.classes, counts.scores))
    class_rates, score_rates = (tuple(values.tolist()) for values in rates)
    return class_rates, score_rates


def _finite_or_none(value: float | None) -> float | None:
    """Return None for infinity, which JSON cannot express."""
    return value if value is not None and np.isfinite(value) else None


def _error_analysis(pairs: Sequence[PairedLogits], reference: Reference) -> ErrorAnalysis | None:
    if not pairs:
        return None
    spec, labels = reference.spec, reference.data.labels
    positions, expected, found = worst_per_image(pairs, spec)
    return analyze_errors(
        spec.class_names, positions, None if labels is None else labels[positions], expected, found, spec
    )
