"""The proof: an artifact and its reference answer for the same images, through the runtime that will serve it."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.checks import Answers, Check, Figures, judge, measure, worst_of_each
from cifarx_export.parity.error_analysis import ErrorAnalysis, analyze_errors
from cifarx_export.parity.metrics import Logits
from cifarx_export.parity.resize import check_resize
from cifarx_export.parity.tolerances import Tolerance
from cifarx_serve.backends.base import Backend, TensorInfo
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec, ModelSpec, ParitySummary

WHOLE_BATCH: Final = 64
"""The batch size that every image goes through."""

BATCH_SIZES: Final = (1, 3, WHOLE_BATCH)
"""One image, an odd number, and many."""

SPREAD_IMAGES: Final = 1000
"""Images, spread over the split, that go through each of the other batch sizes too."""

MIN_IMAGES: Final = 1000
"""Fewer real images than this prove too little of an argmax."""

_NAMES_SHOWN: Final = 12


class ParityData(NamedTuple):
    """Images at the network's size, uint8 (N, height, width, 3), their labels, and what they are.

    `labels` is None where the data set's classes are not the model's: accuracy then means nothing.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    name: str
    fingerprint: str


class Proof(msgspec.Struct, frozen=True):
    """What was found; `summary` travels inside the artifact. No evidence where the artifact gave no answer."""

    checks: tuple[Check, ...]
    summary: ParitySummary
    evidence: ErrorAnalysis | None

    @property
    def passed(self) -> bool:
        return self.summary.passed

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


class Reference(NamedTuple):
    """The reference's answers, found once for any number of artifacts: (N, classes) and (edge inputs, classes)."""

    name: str
    spec: ModelSpec
    data: ParityData
    logits: Logits
    edge_logits: Logits


def run_reference(backend: Backend, data: ParityData, progress: Progress = silent) -> Reference:
    """Run the reference on every image.

    Raises:
        DataError: fewer than `MIN_IMAGES` images.
    """
    if len(data.images) < MIN_IMAGES:
        raise DataError(f"{data.name} has {len(data.images)} test images", f"a proof needs at least {MIN_IMAGES}")
    progress(f"reference: {len(data.images)} images of {data.name} through {backend.name} ({backend.provider})")
    logits = _logits(backend, data.images, np.arange(len(data.images)), WHOLE_BATCH)
    edge_logits = backend.run(model_input(_edge_images(backend.spec.input), backend.spec))
    return Reference(backend.name, backend.spec, data, logits, edge_logits)


def proved_batch_sizes(largest: int | None, images: int) -> tuple[int, ...]:
    """The batch sizes of a proof, with the largest that the user names.

    Raises:
        UsageError: it is below 1, or there are fewer images.
    """
    if largest is None:
        return BATCH_SIZES
    if not 1 <= largest <= images:
        raise UsageError(f"batch size {largest}", f"give 1 to {images}, the number of images of the proof")
    return tuple(sorted({*BATCH_SIZES, largest}))


def check_parity(
    reference: Reference,
    artifact: Backend,
    gate: Tolerance,
    progress: Progress = silent,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Proof:
    """Compare an artifact with its reference on every image: what the file promises, that it runs, then its values."""
    data, expected = reference.data, reference.logits
    checks = [*_check_specs(reference.spec, artifact.spec), *_check_ports(artifact)]
    answers: list[Answers] = []
    for batch_size in batch_sizes:
        positions = _positions(len(data.images), batch_size)
        progress(f"artifact: {len(positions)} images at batch {batch_size} through {artifact.name}")
        check, found = _run_batches(artifact, data.images, positions, batch_size, expected.shape[1])
        checks.append(check)
        if found is not None:
            answers.append(Answers(positions, expected[positions], found))
    edge_check, edge = _run_edges(reference, artifact)
    resized = check_resize(artifact, data.images[_positions(len(data.images), 1)])
    figures = measure(answers, edge, expected, data.labels, gate)
    checks += [edge_check, *resized, *judge(figures, gate)]
    passed = all(check.passed for check in checks)
    summary = _summary(figures, passed, data, artifact.provider, gate, batch_sizes)
    return Proof(tuple(checks), summary, _evidence(answers, reference))


def _check_specs(ours: ModelSpec, theirs: ModelSpec) -> list[Check]:
    """The artifact must promise what the reference does: numbers alone cannot tell a wrong name of a class."""
    return [
        Check(
            "class names", theirs.class_names == ours.class_names, _compare_names(ours.class_names, theirs.class_names)
        ),
        Check("preprocessing", theirs.input == ours.input, _describe(theirs.input)),
    ]


def _compare_names(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """The first name that differs, or the names: of a thousand, the first ones."""
    if len(theirs) != len(ours):
        return f"{len(theirs)} instead of {len(ours)}"
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            return f"class {index} is {their} instead of {our}"
    rest = len(theirs) - _NAMES_SHOWN
    return ", ".join(theirs[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _check_ports(artifact: Backend) -> list[Check]:
    """Names, types and axes; a file that does not state them is told by its answers alone."""
    tensor_infos = artifact.tensor_infos()
    if not tensor_infos:
        return []
    spec = artifact.spec
    taken, pixels = spec.input, spec.embedded_preprocessing
    wanted = (
        TensorInfo("input", "uint8", ("batch", "height", "width", 3))
        if pixels
        else TensorInfo("input", "float32", ("batch", taken.channels, taken.height, taken.width)),
        TensorInfo("logits", "float32", ("batch", len(spec.class_names))),
    )
    found = ", ".join(f"{port.name} {port.dtype} ({', '.join(map(str, port.shape))})" for port in tensor_infos)
    return [Check("interface", tensor_infos == wanted, found)]


def _describe(spec: InputSpec) -> str:
    return (
        f"{spec.colour} {spec.height}x{spec.width}, {spec.resize}, range {spec.value_range}, "
        f"mean {spec.mean}, std {spec.std}"
    )


def _positions(images: int, batch_size: int) -> NDArray[np.int64]:
    if batch_size == WHOLE_BATCH:
        return np.arange(images)
    return np.linspace(0, images - 1, min(images, max(SPREAD_IMAGES, batch_size))).round().astype(np.int64)


def _logits(backend: Backend, images: NDArray[np.uint8], positions: NDArray[np.int64], batch_size: int) -> Logits:
    """Of the images at these positions, a batch in memory at a time: those of ImageNet fill gigabytes."""
    batches = (positions[start : start + batch_size] for start in range(0, len(positions), batch_size))
    return np.concatenate([backend.run(model_input(images[batch], backend.spec)) for batch in batches])


def _run_batches(
    artifact: Backend, images: NDArray[np.uint8], positions: NDArray[np.int64], batch_size: int, classes: int
) -> tuple[Check, Logits | None]:
    name, shape = f"batch {batch_size}", (len(positions), classes)
    try:
        logits = _logits(artifact, images, positions, batch_size)
    except Exception as error:  # a runtime's own errors have no common base; whatever it is, it does not run
        return Check(name, False, f"does not run: {_first_line(error)}"), None
    if logits.shape != shape or logits.dtype != np.float32:
        return Check(name, False, f"{logits.dtype} {logits.shape} instead of float32 {shape}"), None
    return Check(name, True, f"float32 (N, {classes})"), logits


def _edge_images(spec: InputSpec) -> NDArray[np.uint8]:
    """Black, white and noise: what no photograph gives."""
    shape = (1, spec.height, spec.width, spec.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return np.concatenate([np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), noise])


def _run_edges(reference: Reference, artifact: Backend) -> tuple[Check, Answers | None]:
    images = _edge_images(reference.spec.input)
    try:
        logits = np.asarray(artifact.run(model_input(images, artifact.spec)))
    except Exception as error:
        return Check("edge inputs", False, f"does not run: {_first_line(error)}"), None
    if logits.shape != reference.edge_logits.shape:
        return Check("edge inputs", False, f"gives {logits.shape} for {len(images)} images"), None
    answers = Answers(np.empty(0, np.int64), reference.edge_logits, logits)
    return Check("edge inputs", True, "black, white, noise"), answers


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _summary(
    figures: Figures, passed: bool, data: ParityData, provider: str, gate: Tolerance, batch_sizes: Sequence[int]
) -> ParitySummary:
    errors = figures.errors
    return ParitySummary(
        passed=passed,
        images=figures.images,
        batch_sizes=tuple(batch_sizes),
        max_abs_error=_number(errors and errors.max_abs),
        mean_abs_error=_number(errors and errors.mean_abs),
        p999_abs_error=_number(errors and errors.p999_abs),
        required_tolerance=_number(errors and errors.required_tolerance),
        atol=gate.atol,
        rtol=gate.rtol,
        agreement=figures.agreement,
        forgiven=figures.forgiven,
        reference_accuracy=figures.reference_accuracy,
        accuracy=figures.accuracy,
        nonfinite=errors.nonfinite if errors else 0,
        provider=provider,
        data=data.name,
        data_fingerprint=data.fingerprint,
    )


def _number(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and np.isfinite(value) else None


def _evidence(answers: Sequence[Answers], reference: Reference) -> ErrorAnalysis | None:
    if not answers:
        return None
    positions, expected, found = worst_of_each(answers)
    labels = reference.data.labels
    return analyze_errors(
        reference.spec.class_names, positions, None if labels is None else labels[positions], expected, found
    )
