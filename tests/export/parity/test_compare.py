"""The parity check: metrics, tolerances and forgiven flips. Faults it must catch are in `test_planted_faults`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from cifarx_export.parity.compare import (
    BATCH_SIZES,
    ParityResult,
    Reference,
    check_parity,
    parity_batch_sizes,
    run_reference,
)
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.error_analysis import WorstImage
from cifarx_export.parity.tolerances import Tolerance, get_tolerance
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.scores import class_scores
from cifarx_train.binomial import floor_percent
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support.conversion import write_artifact
from tests.support.onnx_faults import (
    edited,
    entry_with,
    frozen_batch,
    node,
    output_through,
    weights_with,
    wrong_at_batch,
)

IMAGES = 1003
"""Number of `parity_images`."""

FEW = BATCH_SIZES[-1] + 3

SPECS = {"class names", "preprocessing", "output"}
RUNS = {"batch 1", "batch 3", "batch 64", "edge inputs"}
NUMBERS = {"batch effects", "finite", "tolerance", "agreement"}

LAST_WEIGHT_OFF = [entry_with((9, 63), lambda value: value + 1e-2, "model.8.weight")]
NAN_IN_A_BIAS = [entry_with((3,), lambda _: float("nan"), "model.8.bias")]
NINE_CLASSES = [
    *(weights_with(f"model.8.{part}", lambda values: values[:9]) for part in ("weight", "bias")),
    output_through(lambda: [node("Identity", "raw", "logits")], shape=("batch", 9)),
]


@pytest.fixture(scope="module")
def reference(confident_checkpoint: Path, parity_images: ParityData) -> Reference:
    reference = reference_of(confident_checkpoint, parity_images)
    assert set(reference.logits.argmax(1)) == set(range(10))
    return reference


@pytest.fixture(scope="module")
def good_onnx(confident_checkpoint: Path) -> Path:
    return confident_checkpoint.with_suffix(".onnx")


@pytest.fixture(scope="module")
def good_torchscript(confident_checkpoint: Path) -> Path:
    return write_artifact(confident_checkpoint, "torchscript", confident_checkpoint.with_suffix(".torchscript.pt"))


@pytest.fixture(scope="module")
def brief(reference: Reference) -> Reference:
    return shortened(reference)


def shortened(reference: Reference) -> Reference:
    """Keep the first images only: enough to catch a fault, and fast."""
    data = reference.data
    assert data.labels is not None
    return reference._replace(
        data=data._replace(images=data.images[:FEW], labels=data.labels[:FEW]),
        logits=reference.logits[:FEW],
        single_logits=reference.single_logits[:FEW],
    )


LastLayer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def with_last_layer(loaded: Checkpoint, change: LastLayer) -> Checkpoint:
    state = {key: value.clone() for key, value in loaded.weights.items()}
    state["model.8.weight"], state["model.8.bias"] = change(state["model.8.weight"], state["model.8.bias"])
    return loaded._replace(weights=state)


def checkpoint_with(source: Path, change: LastLayer) -> Path:
    """Write a copy of a checkpoint with another last layer to the current folder."""
    save_checkpoint(Path("edited.pth"), with_last_layer(load_checkpoint(source), change))
    return Path("edited.pth")


def reference_of(checkpoint: Path, data: ParityData) -> Reference:
    with PyTorchBackend(checkpoint, Device("cpu")) as backend:
        return run_reference(backend, data)


def result_of(path: Path, reference: Reference, tolerance: Tolerance | None = None) -> ParityResult:
    with open_backend(path, device="cpu") as backend:
        return check_parity(reference, backend, tolerance or get_tolerance("fp32"))


def failed(result: ParityResult) -> set[str]:
    return {check.name for check in result.failures}


def found(result: ParityResult, name: str) -> str:
    return next(check.found for check in result.checks if check.name == name)


def worst_of(path: Path, reference: Reference) -> WorstImage:
    analysis = result_of(path, reference).error_analysis
    assert analysis is not None
    return analysis.worst[0]


@pytest.mark.parametrize("kind", ["good_onnx", "good_torchscript"])
def test_a_good_artifact_passes_every_check(kind: str, brief: Reference, request: pytest.FixtureRequest) -> None:
    result = result_of(request.getfixturevalue(kind), brief)
    assert result.passed
    assert result.failures == []
    stated = {"interface"} if kind == "good_onnx" else set()  # TorchScript files do not state their inputs
    assert {check.name for check in result.checks} == SPECS | stated | RUNS | NUMBERS
    summary = result.summary
    assert (summary.images, summary.batch_sizes) == (FEW, BATCH_SIZES)
    assert (summary.agreement, summary.forgiven, summary.nonfinite) == (1.0, 0, 0)
    assert summary.accuracy == summary.reference_accuracy
    assert (summary.atol, summary.rtol) == (1e-4, 1e-4)
    assert (summary.data, summary.data_fingerprint) == (brief.data.name, brief.data.fingerprint)


def test_an_artifact_that_does_not_run_fails_with_the_reason(good_onnx: Path, brief: Reference) -> None:
    result = result_of(edited(good_onnx, [frozen_batch(2)]), brief)
    for name in RUNS:
        assert found(result, name).startswith("does not run: ")
    summary = result.summary
    assert (summary.max_abs_error, summary.required_tolerance, summary.accuracy) == (None, None, None)
    assert summary.agreement == 0.0
    assert result.error_analysis is None


def test_a_wrong_shape_is_reported_with_the_right_one(good_onnx: Path, brief: Reference) -> None:
    result = result_of(edited(good_onnx, NINE_CLASSES), brief)
    assert found(result, "batch 64") == "returns float32 (64, 9) instead of float32 (64, 10)"


def test_a_result_with_nan_is_valid_json(good_onnx: Path, brief: Reference) -> None:
    result = result_of(edited(good_onnx, NAN_IN_A_BIAS), brief)
    assert result.summary.nonfinite == 3 * FEW + 6  # every image at every batch size, and the edge inputs twice

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    document = json.loads(msgspec.json.encode(result), parse_constant=refuse)
    assert document["error_analysis"]["worst"][0]["artifact"][3] is None
    assert result.summary.max_abs_error is not None  # from the other logits
    assert result.summary.max_abs_error < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reference_that_is_not_finite_fails(
    value: float, confident_checkpoint: Path, good_onnx: Path, parity_images: ParityData
) -> None:
    broken = checkpoint_with(
        confident_checkpoint, lambda weight, bias: (weight, bias.index_fill(0, torch.tensor(3), value))
    )
    broken_reference = shortened(reference_of(broken, parity_images))
    same_fault = edited(good_onnx, [entry_with((3,), lambda _: value, "model.8.bias")])
    assert "finite" in failed(result_of(same_fault, broken_reference))
    assert "finite" in failed(result_of(good_onnx, broken_reference))


def run(path: Path, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logits of ONNX Runtime, without cifarx."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": part})[0] for part in np.array_split(images, 16)]).astype(float)


def test_the_metrics_match_a_plain_recomputation(good_onnx: Path, reference: Reference) -> None:
    path = edited(good_onnx, [entry_with((4,), lambda value: value + 0.25, "model.8.bias")])
    summary = result_of(path, reference).summary
    data = reference.data
    actual, expected = run(path, normalize(data.images, reference.spec.input)), reference.logits.astype(np.float64)
    assert summary.max_abs_error == pytest.approx(0.25, abs=1e-4)
    assert summary.p999_abs_error == pytest.approx(0.25, abs=1e-4)
    assert summary.mean_abs_error == pytest.approx(0.25 / 10, abs=1e-4)
    # At the logit of class 4 closest to 0, among a thousand images and three edge inputs.
    assert summary.required_tolerance == pytest.approx((0.25 / (1 + np.abs(expected[:, 4]))).max(), rel=0.02)
    assert summary.agreement == pytest.approx((actual.argmax(1) == expected.argmax(1)).mean())
    assert summary.accuracy == (actual.argmax(1) == data.labels).mean()
    assert summary.reference_accuracy == (expected.argmax(1) == data.labels).mean()
    assert summary.accuracy != summary.reference_accuracy
    assert summary.provider == "CPUExecutionProvider"


def test_the_worst_image_is_the_one_with_the_largest_error(good_onnx: Path, brief: Reference) -> None:
    path = edited(good_onnx, LAST_WEIGHT_OFF)
    worst = worst_of(path, brief)
    actual = run(path, normalize(brief.data.images, brief.spec.input))
    error = np.abs(actual - brief.logits).max(axis=1)
    assert error[worst.image] == pytest.approx(error.max(), abs=1e-4)
    np.testing.assert_allclose(np.array(worst.reference, np.float64), brief.logits[worst.image], atol=1e-5)
    np.testing.assert_allclose(np.array(worst.artifact, np.float64), actual[worst.image], atol=1e-4)


@pytest.mark.parametrize("size", BATCH_SIZES)
def test_the_worst_image_is_found_at_any_batch_size(size: int, good_onnx: Path, brief: Reference) -> None:
    worst = worst_of(edited(good_onnx, [wrong_at_batch(size)]), brief)
    error = np.array(worst.artifact, np.float64) - np.array(worst.reference, np.float64)
    np.testing.assert_allclose(error, 0.01, atol=1e-4)


# Forgiven flips: class 1 of the reference is class 0 minus a margin, so every image predicted as 0 is almost a 1.

HUNDREDTH = Tolerance(1e-2, 0.0, 1.0)
"""Far above the rounding errors of these logits."""


class Tied(NamedTuple):
    """A reference, an artifact that adds `steps` to its logits, and the images whose prediction flips."""

    reference: Reference
    artifact: Path
    flipped: NDArray[np.bool_]
    forgiven: NDArray[np.bool_]


def tied(
    confident_checkpoint: Path, good_onnx: Path, parity_images: ParityData, margin: float, steps: dict[int, float]
) -> Tied:
    def tie(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight[1], bias[1] = weight[0], bias[0] - margin
        return weight, bias

    path = checkpoint_with(confident_checkpoint, tie)
    layer = load_checkpoint(path).weights
    added = np.array([steps.get(index, 0.0) for index in range(10)], np.float32)
    artifact = edited(
        good_onnx,
        [
            weights_with("model.8.weight", lambda _: layer["model.8.weight"].numpy()),
            weights_with("model.8.bias", lambda _: layer["model.8.bias"].numpy() + added),
        ],
    )
    reference = reference_of(path, parity_images)
    predicted = (reference.logits + added).argmax(1)
    lost = reference.logits.max(axis=1) - reference.logits[np.arange(len(predicted)), predicted]
    return Tied(reference, artifact, lost > 0, (lost > 0) & (lost <= HUNDREDTH.atol))


def test_a_flip_within_the_margin_of_the_reference_is_forgiven_counted_and_reported(
    confident_checkpoint: Path, good_onnx: Path, parity_images: ParityData
) -> None:
    case = tied(confident_checkpoint, good_onnx, parity_images, margin=2e-3, steps={0: -4e-3, 1: 4e-3})
    count = int(case.flipped.sum())
    assert count == case.forgiven.sum() > 0
    result = result_of(case.artifact, case.reference, HUNDREDTH)
    assert result.passed
    assert result.summary.forgiven == count
    assert result.summary.agreement == pytest.approx(1 - count / IMAGES)
    flips = "flip" if count == 1 else "flips"
    expected = f"{1 - count / IMAGES:.4%} of {IMAGES} images, {count} {flips} forgiven (minimum 100%)"
    assert expected in found(result, "agreement")


def test_a_flip_outside_the_margin_of_the_reference_fails_even_if_every_logit_is_inside(
    confident_checkpoint: Path, good_onnx: Path, parity_images: ParityData
) -> None:
    case = tied(confident_checkpoint, good_onnx, parity_images, margin=1.5e-2, steps={0: -9e-3, 1: 9e-3})
    assert case.flipped.sum() > case.forgiven.sum()
    result = result_of(case.artifact, case.reference, HUNDREDTH)
    assert failed(result) == {"agreement"}
    assert result.summary.forgiven == case.forgiven.sum()
    assert result.summary.agreement == pytest.approx(1 - case.flipped.mean())


def test_forgiving_some_flips_does_not_forgive_the_others(
    confident_checkpoint: Path, good_onnx: Path, parity_images: ParityData
) -> None:
    case = tied(confident_checkpoint, good_onnx, parity_images, margin=2e-3, steps={0: -4e-3, 1: 4e-3, 5: 0.5})
    assert case.flipped.sum() > case.forgiven.sum() > 0
    result = result_of(case.artifact, case.reference, HUNDREDTH)
    assert failed(result) == {"tolerance", "agreement"}
    assert result.summary.forgiven == case.forgiven.sum()
    assert result.summary.agreement == pytest.approx(1 - case.flipped.mean())


def test_a_smaller_tolerance_fails_and_is_reported(good_onnx: Path, brief: Reference) -> None:
    result = result_of(good_onnx, brief, get_tolerance("fp32", atol=0.0, rtol=0.0))
    assert failed(result) == {"tolerance"}
    assert (result.summary.atol, result.summary.rtol, result.summary.agreement) == (0.0, 0.0, 1.0)
    assert " logits outside 0 + 0·|ref|" in found(result, "tolerance")


def test_the_required_tolerance_is_the_one_that_would_pass(good_onnx: Path, brief: Reference) -> None:
    needed = result_of(good_onnx, brief).summary.required_tolerance
    assert needed is not None
    assert result_of(good_onnx, brief, get_tolerance("fp32", needed * 1.0001, needed * 1.0001)).passed
    assert not result_of(good_onnx, brief, get_tolerance("fp32", needed * 0.9999, needed * 0.9999)).passed


def test_without_labels_there_is_no_accuracy(good_onnx: Path, brief: Reference) -> None:
    unlabeled = brief._replace(data=brief.data._replace(labels=None))
    result = result_of(good_onnx, unlabeled)
    assert result.passed
    assert (result.summary.accuracy, result.summary.reference_accuracy) == (None, None)


@pytest.mark.parametrize("count", [1, 5, 37])
def test_any_number_of_images_is_checked_at_every_batch_size(
    confident_checkpoint: Path, good_onnx: Path, parity_images: ParityData, count: int
) -> None:
    assert parity_images.labels is not None
    few = parity_images._replace(images=parity_images.images[:count], labels=parity_images.labels[:count])
    reference = reference_of(confident_checkpoint, few)
    assert len(reference.logits) == count
    result = result_of(good_onnx, reference)
    assert result.passed
    assert result.summary.agreement_bound == pytest.approx(0.05 ** (1 / count))
    (warning,) = result.summary.warnings
    proved = floor_percent(0.05 ** (1 / count))
    assert warning.startswith(f"only {count} images: even an agreement of 100% proves only {proved}")
    for size in BATCH_SIZES[1:]:
        assert failed(result_of(edited(good_onnx, [wrong_at_batch(size)]), reference)) == {"tolerance"}


def test_the_accuracy_is_that_of_the_test_images_alone(
    confident_checkpoint: Path, good_onnx: Path, parity_images: ParityData
) -> None:
    joined = parity_images._replace(training_rows=tuple(range(IMAGES - 400)), training_total=5000)
    reference = reference_of(confident_checkpoint, joined)
    summary = result_of(good_onnx, reference).summary
    assert (summary.images, summary.test_images, summary.training_images) == (IMAGES, 400, IMAGES - 400)
    assert parity_images.labels is not None
    expected = (reference.logits[:400].argmax(1) == parity_images.labels[:400]).mean()
    assert summary.reference_accuracy == pytest.approx(expected)
    assert summary.accuracy == pytest.approx(expected)
    assert summary.class_rates is not None
    assert summary.score_rates is not None
    predicted = np.bincount(reference.logits[:400].argmax(1), minlength=reference.spec.output_size)
    assert summary.class_rates == pytest.approx(predicted / 400)
    assert sum(summary.score_rates) == pytest.approx(1)
    best = class_scores(reference.logits[:400], reference.spec).max(axis=1)
    assert summary.score_rates[-1] == pytest.approx((best > 0.9).mean())


# The batch size that a user gives is checked too.


@pytest.mark.parametrize(
    ("extra", "sizes"), [(None, (1, 3, 64)), (1, (1, 3, 64)), (7, (1, 3, 7, 64)), (100, (1, 3, 64, 100))]
)
def test_the_batch_sizes_of_a_parity_check(extra: int | None, sizes: tuple[int, ...]) -> None:
    assert parity_batch_sizes(extra, 100) == sizes


@pytest.mark.parametrize(("extra", "images", "largest"), [(-1, 100, 100), (0, 100, 100), (101, 100, 100), (65, 5, 64)])
def test_an_impossible_batch_size_is_rejected(extra: int, images: int, largest: int) -> None:
    with pytest.raises(
        UsageError, match=f"batch size {extra} is out of range: give 1 to {largest}, for {images} images"
    ):
        parity_batch_sizes(extra, images)


def test_a_fault_at_the_given_batch_size_is_found_only_there(good_onnx: Path, brief: Reference) -> None:
    path = edited(good_onnx, [wrong_at_batch(7)])
    assert result_of(path, brief).passed
    with open_backend(path, device="cpu") as backend:
        result = check_parity(brief, backend, get_tolerance("fp32"), batch_sizes=parity_batch_sizes(7, FEW))
    assert failed(result) == {"tolerance"}
    assert result.summary.batch_sizes == (1, 3, 7, 64)
