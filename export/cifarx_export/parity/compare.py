"""The parity check: run an artifact and its reference on the same images and compare their logits.

The artifact runs in the backend that will serve it.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

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
from cifarx_export.parity.data import ParityData, evenly_spaced
from cifarx_export.parity.error_analysis import ErrorAnalysis, analyze_errors
from cifarx_export.parity.metrics import Logits
from cifarx_export.parity.resize import check_resize
from cifarx_export.parity.tolerances import Tolerance
from cifarx_serve.backends.base import Backend, TensorInfo
from cifarx_serve.errors import DataError, DeviceMemoryError, UsageError, error_message
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec, ModelSpec, ParitySummary

EVAL_BATCH_SIZE: Final = 64
"""Batch size at which every image is run."""

BATCH_SIZES: Final = (1, 3, EVAL_BATCH_SIZE)
"""Default batch sizes of the check: one image, an odd number, and many."""

SUBSET_IMAGES: Final = 1000
"""Number of images, evenly spaced over the split, that are run at each of the other batch sizes."""

MIN_IMAGES: Final = 1000
"""Minimum number of real images: with fewer, the argmax agreement says too little."""

_MAX_NAMES: Final = 12


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


class Reference(NamedTuple):
    """The reference and its logits, computed once for any number of artifacts.

    Attributes:
        name: name of its backend.
        spec: its model spec.
        data: the images of the check.
        logits: logits of these images, (N, classes).
        edge_logits: logits of the edge inputs, (edge inputs, classes).
    """

    name: str
    spec: ModelSpec
    data: ParityData
    logits: Logits
    edge_logits: Logits


def run_reference(backend: Backend, data: ParityData, progress: Progress = silent) -> Reference:
    """Run the reference on every image and on the edge inputs.

    Raises:
        DataError: there are fewer than `MIN_IMAGES` images.
    """
    if len(data.images) < MIN_IMAGES:
        raise DataError(
            f"{data.name} has {len(data.images)} test images", f"use a dataset with at least {MIN_IMAGES} test images"
        )
    progress(f"reference: running {len(data.images)} images of {data.name} with {backend.name} ({backend.provider})")
    logits = _run(backend, data.images, np.arange(len(data.images)), EVAL_BATCH_SIZE)
    edge_logits = backend.run(model_input(_edge_images(backend.spec.input), backend.spec))
    return Reference(backend.name, backend.spec, data, logits, edge_logits)


def parity_batch_sizes(extra: int | None, images: int) -> tuple[int, ...]:
    """Return the batch sizes of a parity check: the default ones, and `extra` if it is given.

    Raises:
        UsageError: `extra` is below 1 or above the number of images.
    """
    if extra is None:
        return BATCH_SIZES
    if not 1 <= extra <= images:
        raise UsageError(f"batch size {extra} is out of range", f"give 1 to {images}, the number of test images")
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
    compares the logits. An artifact that fails to run is a failed check, not an exception.

    Args:
        reference: from `run_reference`.
        artifact: the opened artifact.
        tolerance: the tolerance of its precision.
        progress: called with a line about each step.
        batch_sizes: from `parity_batch_sizes`.
    """
    data, expected = reference.data, reference.logits
    checks = [*_check_specs(reference.spec, artifact.spec), *_check_interface(artifact)]
    pairs: list[PairedLogits] = []
    for batch_size in batch_sizes:
        positions = _positions(len(data.images), batch_size)
        progress(f"artifact: running {len(positions)} images in batches of {batch_size} with {artifact.name}")
        check, logits = _run_batches(artifact, data.images, positions, batch_size, expected.shape[1])
        checks.append(check)
        if logits is not None:
            pairs.append(PairedLogits(positions, expected[positions], logits))
    edge_check, edge = _run_edge_inputs(reference, artifact)
    resize_checks = check_resize(artifact, data.images[_positions(len(data.images), 1)])
    metrics = compute_metrics(pairs, edge, expected, data.labels, tolerance)
    checks += [edge_check, *resize_checks, *check_metrics(metrics, tolerance)]
    passed = all(check.passed for check in checks)
    summary = _summary(metrics, passed, data, artifact.provider, tolerance, batch_sizes)
    return ParityResult(tuple(checks), summary, _error_analysis(pairs, reference))


def _check_specs(reference: ModelSpec, artifact: ModelSpec) -> list[Check]:
    """Compare class names and preprocessing: equal logits do not reveal a wrong class name."""
    return [
        Check(
            "class names",
            artifact.class_names == reference.class_names,
            _compare_names(reference.class_names, artifact.class_names),
        ),
        Check("preprocessing", artifact.input == reference.input, _describe(artifact.input)),
    ]


def _compare_names(reference: tuple[str, ...], artifact: tuple[str, ...]) -> str:
    """Return the first difference, or the first `_MAX_NAMES` names if there is none."""
    if len(artifact) != len(reference):
        return f"{len(artifact)} instead of {len(reference)}"
    for index, (expected, found) in enumerate(zip(reference, artifact, strict=True)):
        if expected != found:
            return f"class {index} is {found} instead of {expected}"
    rest = len(artifact) - _MAX_NAMES
    return ", ".join(artifact[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _check_interface(artifact: Backend) -> list[Check]:
    """Compare names, dtypes and shapes of input and output, if the file states them."""
    found = artifact.tensor_infos()
    if not found:
        return []
    spec = artifact.spec
    expected = (
        TensorInfo("input", "uint8", ("batch", "height", "width", 3))
        if spec.embedded_preprocessing
        else TensorInfo("input", "float32", ("batch", spec.input.channels, spec.input.height, spec.input.width)),
        TensorInfo("logits", "float32", ("batch", len(spec.class_names))),
    )
    text = ", ".join(f"{info.name} {info.dtype} ({', '.join(map(str, info.shape))})" for info in found)
    return [Check("interface", found == expected, text)]


def _describe(spec: InputSpec) -> str:
    return (
        f"{spec.color} {spec.height}x{spec.width}, {spec.interpolation}, range {spec.value_range}, "
        f"mean {spec.mean}, std {spec.std}"
    )


def _positions(images: int, batch_size: int) -> NDArray[np.int64]:
    """Return the positions of the images that are run at this batch size."""
    if batch_size == EVAL_BATCH_SIZE:
        return np.arange(images)
    return evenly_spaced(images, max(SUBSET_IMAGES, batch_size))


def _run(backend: Backend, images: NDArray[np.uint8], positions: NDArray[np.int64], batch_size: int) -> Logits:
    """Return the logits of the images at these positions.

    Preprocesses one batch at a time: all images of ImageNet's size as float32 would take gigabytes.
    """
    batches = (positions[start : start + batch_size] for start in range(0, len(positions), batch_size))
    return np.concatenate([backend.run(model_input(images[batch], backend.spec)) for batch in batches])


def _run_batches(
    artifact: Backend, images: NDArray[np.uint8], positions: NDArray[np.int64], batch_size: int, classes: int
) -> tuple[Check, Logits | None]:
    name, shape = f"batch {batch_size}", (len(positions), classes)
    try:
        logits = _run(artifact, images, positions, batch_size)
    except DeviceMemoryError:
        raise
    except Exception as error:  # the errors of the runtimes have no common base class
        return Check(name, False, f"does not run: {error_message(error)}"), None
    if logits.shape != shape or logits.dtype != np.float32:
        return Check(name, False, f"{logits.dtype} {logits.shape} instead of float32 {shape}"), None
    return Check(name, True, f"float32 (N, {classes})"), logits


def _edge_images(spec: InputSpec) -> NDArray[np.uint8]:
    """Return a black, a white and a noise image: inputs that no photograph covers."""
    shape = (1, spec.height, spec.width, spec.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return np.concatenate([np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), noise])


def _run_edge_inputs(reference: Reference, artifact: Backend) -> tuple[Check, PairedLogits | None]:
    images = _edge_images(reference.spec.input)
    try:
        logits = np.asarray(artifact.run(model_input(images, artifact.spec)))
    except DeviceMemoryError:
        raise
    except Exception as error:  # see _run_batches
        return Check("edge inputs", False, f"does not run: {error_message(error)}"), None
    if logits.shape != reference.edge_logits.shape:
        return Check("edge inputs", False, f"{logits.shape} instead of {reference.edge_logits.shape}"), None
    pair = PairedLogits(np.empty(0, np.int64), reference.edge_logits, logits)
    return Check("edge inputs", True, "black, white, noise"), pair


def _summary(
    metrics: ParityMetrics,
    passed: bool,
    data: ParityData,
    provider: str,
    tolerance: Tolerance,
    batch_sizes: Sequence[int],
) -> ParitySummary:
    errors = metrics.errors
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
    )


def _finite_or_none(value: float | None) -> float | None:
    """Return None for infinity, which JSON cannot express."""
    return value if value is not None and np.isfinite(value) else None


def _error_analysis(pairs: Sequence[PairedLogits], reference: Reference) -> ErrorAnalysis | None:
    if not pairs:
        return None
    positions, expected, found = worst_per_image(pairs)
    labels = reference.data.labels
    return analyze_errors(
        reference.spec.class_names, positions, None if labels is None else labels[positions], expected, found
    )
