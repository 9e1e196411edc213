"""The proof: an artifact and its reference answer for the same images, through the runtime that will serve it."""

from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.comparison import Errors, Flips, Logits, compare, find_flips
from cifarx_export.gates import Gate
from cifarx_serve.backends.base import Backend
from cifarx_serve.errors import DataError
from cifarx_serve.preprocess import scale
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec, ModelSpec, ParitySummary

BATCH_SIZES: Final = (1, 3, 64)
"""One image, an odd number, and many; every image goes through the largest."""

SMALL_BATCH_IMAGES: Final = 1000
"""Images, spread over the split, that go through each of the smaller batch sizes too."""

MIN_IMAGES: Final = 1000
"""Fewer real images than this prove too little of an argmax."""


class ProofData(NamedTuple):
    """Images at the network's size, uint8 (N, height, width, 3), their labels, and what they are.

    `labels` is None where the data set's classes are not the model's: accuracy then means nothing.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    name: str
    fingerprint: str


class Check(msgspec.Struct, frozen=True):
    """One thing that was checked, and what was found."""

    name: str
    passed: bool
    found: str


class Worst(msgspec.Struct, frozen=True):
    """The image with the largest error of a logit, by its position in the data."""

    image: int
    reference: tuple[float, ...]
    artifact: tuple[float, ...]


class Proof(msgspec.Struct, frozen=True):
    """What was found; `summary` travels inside the artifact."""

    checks: tuple[Check, ...]
    summary: ParitySummary
    worst: Worst | None

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
    data: ProofData
    logits: Logits
    edge_logits: Logits


class _Answers(NamedTuple):
    """Logits of both for the images of one batch size; `positions` says which images, empty for edge inputs."""

    positions: NDArray[np.int64]
    reference: Logits
    artifact: Logits


def ask_reference(backend: Backend, data: ProofData, progress: Progress = silent) -> Reference:
    """Run the reference on every image.

    Raises:
        DataError: fewer than `MIN_IMAGES` images.
    """
    if len(data.images) < MIN_IMAGES:
        raise DataError(f"{data.name} has {len(data.images)} test images", f"a proof needs at least {MIN_IMAGES}")
    progress(f"reference: {len(data.images)} images of {data.name} through {backend.name} ({backend.provider})")
    logits = _logits(backend, data.images, BATCH_SIZES[-1])
    return Reference(backend.name, backend.spec, data, logits, backend.run(_edge_inputs(backend.spec.input)))


def prove(reference: Reference, artifact: Backend, gate: Gate, progress: Progress = silent) -> Proof:
    """Compare an artifact with its reference on every image."""
    data, expected = reference.data, reference.logits
    checks = _check_specs(reference.spec, artifact.spec)
    answers: list[_Answers] = []
    for batch_size in BATCH_SIZES:
        positions = _positions(len(data.images), batch_size)
        progress(f"artifact: {len(positions)} images at batch {batch_size} through {artifact.name}")
        check, found = _run_batches(artifact, data.images[positions], batch_size, expected.shape[1])
        checks.append(check)
        if found is not None:
            answers.append(_Answers(positions, expected[positions], found))
    edge_check, edge = _run_edges(reference, artifact)
    checks.append(edge_check)
    return _judge(checks, answers, edge, reference, artifact.provider, gate)


def _check_specs(ours: ModelSpec, theirs: ModelSpec) -> list[Check]:
    """The artifact must promise what the reference does: numbers alone cannot tell a wrong name of a class."""
    return [
        Check("class names", theirs.class_names == ours.class_names, ", ".join(theirs.class_names)),
        Check("preprocessing", theirs.input == ours.input, _describe(theirs.input)),
    ]


def _describe(spec: InputSpec) -> str:
    return (
        f"{spec.colour} {spec.height}x{spec.width}, {spec.resize}, range {spec.value_range}, "
        f"mean {spec.mean}, std {spec.std}"
    )


def _positions(images: int, batch_size: int) -> NDArray[np.int64]:
    if batch_size == BATCH_SIZES[-1]:
        return np.arange(images)
    return np.linspace(0, images - 1, min(images, SMALL_BATCH_IMAGES)).round().astype(np.int64)


def _logits(backend: Backend, images: NDArray[np.uint8], batch_size: int) -> Logits:
    return np.concatenate([backend.run(inputs) for inputs in _inputs(backend.spec.input, images, batch_size)])


def _inputs(spec: InputSpec, images: NDArray[np.uint8], batch_size: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(images), batch_size):
        yield scale(images[start : start + batch_size], spec)


def _run_batches(
    artifact: Backend, images: NDArray[np.uint8], batch_size: int, classes: int
) -> tuple[Check, Logits | None]:
    name = f"batch {batch_size}"
    try:
        logits = _logits(artifact, images, batch_size)
    except Exception as error:  # a runtime's own errors have no common base; whatever it is, it does not run
        return Check(name, False, f"does not run: {_first_line(error)}"), None
    if logits.shape != (len(images), classes) or logits.dtype != np.float32:
        found = f"{logits.dtype} {logits.shape} instead of float32 {(len(images), classes)}"
        return Check(name, False, found), None
    return Check(name, True, f"float32 (N, {classes})"), logits


def _edge_inputs(spec: InputSpec) -> NDArray[np.float32]:
    """Zeros, ones and noise: inputs that no photograph gives."""
    shape = (1, spec.channels, spec.height, spec.width)
    noise = np.random.default_rng(0).random(shape, dtype=np.float32)
    return np.concatenate([np.zeros(shape, np.float32), np.ones(shape, np.float32), noise])


def _run_edges(reference: Reference, artifact: Backend) -> tuple[Check, _Answers | None]:
    inputs = _edge_inputs(reference.spec.input)
    try:
        logits = np.asarray(artifact.run(inputs))
    except Exception as error:
        return Check("edge inputs", False, f"does not run: {_first_line(error)}"), None
    if logits.shape != reference.edge_logits.shape:
        return Check("edge inputs", False, f"gives {logits.shape} for {len(inputs)} inputs"), None
    answers = _Answers(np.empty(0, np.int64), reference.edge_logits, logits)
    return Check("edge inputs", True, "zeros, ones, noise"), answers


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _judge(
    checks: list[Check],
    answers: list[_Answers],
    edge: _Answers | None,
    reference: Reference,
    provider: str,
    gate: Gate,
) -> Proof:
    data = reference.data
    every = answers if edge is None else [*answers, edge]
    errors: Errors | None = None
    agreement, forgiven = 0.0, 0
    if answers:
        errors = compare(
            np.concatenate([part.reference for part in every]), np.concatenate([part.artifact for part in every]), gate
        )
        agreement, forgiven = _agreement(answers, len(data.images), gate)
        checks += _check_numbers(errors, agreement, forgiven, len(data.images), gate)
    summary = ParitySummary(
        passed=all(check.passed for check in checks),
        images=len(data.images),
        batch_sizes=BATCH_SIZES,
        max_abs_error=_number(errors and errors.max_abs),
        mean_abs_error=_number(errors and errors.mean_abs),
        p999_abs_error=_number(errors and errors.p999_abs),
        required_tolerance=_number(errors and errors.required_tolerance),
        atol=gate.atol,
        rtol=gate.rtol,
        agreement=agreement,
        forgiven=forgiven,
        reference_accuracy=_accuracy(reference.logits, data.labels),
        accuracy=_accuracy(answers[-1].artifact, data.labels) if _is_whole(answers, data) else None,
        nonfinite=errors.nonfinite if errors else 0,
        provider=provider,
        data=data.name,
        data_fingerprint=data.fingerprint,
    )
    return Proof(tuple(checks), summary, _worst(answers))


def _agreement(answers: list[_Answers], images: int, gate: Gate) -> tuple[float, int]:
    """The share of the images that have the reference's argmax at every batch size, and how many flips are forgiven."""
    flipped = np.zeros(images, np.bool_)
    unforgiven = np.zeros(images, np.bool_)
    for part in answers:
        flips: Flips = find_flips(part.reference, part.artifact, gate)
        flipped[part.positions[flips.positions]] = True
        unforgiven[part.positions[flips.positions[~flips.forgiven]]] = True
    return 1 - float(flipped.mean()), int((flipped & ~unforgiven).sum())


def _check_numbers(errors: Errors, agreement: float, forgiven: int, images: int, gate: Gate) -> list[Check]:
    excused = f", {forgiven} forgiven" if forgiven else ""
    return [
        Check("finite", errors.nonfinite == 0, f"{errors.nonfinite} NaN or Inf"),
        Check(
            "tolerance",
            errors.outside == 0,
            f"max |Δ| {errors.max_abs:.2e}, {errors.outside} outside {gate.atol:g} + {gate.rtol:g}·|ref|",
        ),
        Check(
            "agreement",
            agreement + forgiven / images >= gate.agreement - 1e-12,
            f"{agreement:.4%} of {images} images{excused} (at least {gate.agreement:.4g})",
        ),
    ]


def _is_whole(answers: list[_Answers], data: ProofData) -> bool:
    return bool(answers) and len(answers[-1].positions) == len(data.images)


def _accuracy(logits: Logits, labels: NDArray[np.int64] | None) -> float | None:
    return None if labels is None else float((logits.argmax(1) == labels).mean())


def _number(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and np.isfinite(value) else None


def _worst(answers: list[_Answers]) -> Worst | None:
    """At any batch size."""
    if not answers:
        return None
    errors = [_row_errors(part) for part in answers]
    part, error = max(zip(answers, errors, strict=True), key=lambda pair: float(pair[1].max()))
    row = int(error.argmax())
    return Worst(
        int(part.positions[row]), tuple(map(float, part.reference[row])), tuple(map(float, part.artifact[row]))
    )


def _row_errors(part: _Answers) -> NDArray[np.float64]:
    """The largest error of each image, (N,); Inf where a logit is not finite."""
    with np.errstate(invalid="ignore"):  # Inf of both gives NaN, which is as bad
        error = np.abs(part.artifact.astype(np.float64) - part.reference)
    largest: NDArray[np.float64] = np.where(np.isfinite(error), error, np.inf).max(axis=1)
    return largest
