"""Faults planted in OpenVINO files: each runs in OpenVINO and must fail the expected check."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest

from cifarx_export.formats.onnx.converter import OnnxArtifact
from cifarx_export.formats.openvino import convert_artifact
from cifarx_export.parity.compare import EVAL_BATCH_SIZE, Reference, check_parity, run_reference
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.registry import open_backend, read_spec
from cifarx_serve.devices import Device
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support.onnx_faults import (
    Edit,
    batch_mean_subtracted,
    channels_swapped,
    edited,
    entry_with,
    fields_with,
    first_for_all,
    frozen_batch,
    input_with,
    mean_baked,
    nan_for_black,
    node,
    output_through,
    permuted_classes,
    quantized,
    rows_shifted,
    softmaxed,
    spec_with,
    tf32,
    weights_with,
)

pytest.importorskip("openvino")

FEW = EVAL_BATCH_SIZE + 3
RUNS = {"batch 1", "batch 3", "batch 64", "edge inputs"}
VALUES = {"tolerance", "agreement"}
LAST = ("model.8.weight", "model.8.bias")


class Fault(NamedTuple):
    """Edits of the ONNX model before its conversion; `must_fail` are checks that fail, `may_fail` may, no others do."""

    edits: Sequence[Edit]
    must_fail: AbstractSet[str]
    may_fail: AbstractSet[str] = frozenset()


FAULTS = {
    "channels in another order": Fault([channels_swapped()], {"tolerance"}, VALUES),
    "layout": Fault([input_with(layout="NHWC")], RUNS | {"interface"}),
    "mean of the spec": Fault([input_with(mean=(0.49, 0.48, 0.45))], {"preprocessing", "tolerance"}, VALUES),
    "std of the spec": Fault([input_with(std=(0.25, 0.25, 0.25))], {"preprocessing", "tolerance"}, VALUES),
    "mean in the graph": Fault([mean_baked(0.05)], {"tolerance"}, VALUES),
    "wrong resize": Fault([input_with(interpolation="nearest")], {"preprocessing"}),
    "batch frozen": Fault([frozen_batch(2)], RUNS | {"interface"}),
    "first image for all": Fault([first_for_all()], VALUES),
    "logits of the next image": Fault([rows_shifted()], VALUES),
    "mean of the batch": Fault([batch_mean_subtracted()], VALUES),
    "saturation": Fault([quantized(1e-3), fields_with(precision="int8")], {"agreement"}, {"accuracy"}),
    "dropped bias": Fault([weights_with("model.8.bias", np.zeros_like)], VALUES),
    "classes in another order": Fault(
        [weights_with(name, lambda values: np.roll(values, 1, axis=0)) for name in LAST], VALUES
    ),
    "class names in another order": Fault([spec_with(permuted_classes)], {"class names"}),
    "stale weights": Fault([weights_with("", lambda values: values[::-1])], {"tolerance"}, VALUES),
    "weights rounded to TF32": Fault([weights_with("", tf32)], {"tolerance"}, VALUES),
    "one bias off by three tolerances": Fault(
        [entry_with((4,), lambda value: value + 3e-4, "model.8.bias")], {"tolerance"}, VALUES
    ),
    "NaN": Fault([entry_with((3,), lambda _: float("nan"), "model.8.bias")], {"finite", "agreement"}),
    "NaN for a black image": Fault([nan_for_black()], {"finite"}),
    "softmax": Fault([softmaxed()], {"tolerance"}),
}


@pytest.fixture(scope="module")
def reference(confident_checkpoint: Path, parity_images: ParityData) -> Reference:
    """The reference on the first images, whose labels are its predictions: then every flip costs accuracy."""
    with PyTorchBackend(confident_checkpoint, Device("cpu")) as backend:
        labels = run_reference(backend, parity_images).logits.argmax(1)[:FEW]
        few = parity_images._replace(images=parity_images.images[:FEW], labels=labels)
        return run_reference(backend, few)


def failed_checks(checkpoint: Path, edits: Sequence[Edit], reference: Reference) -> tuple[set[str], str]:
    """Return the names of the checks that fail for a file that is made from an edited ONNX file, and all as text."""
    changed = edited(checkpoint.with_suffix(".onnx"), edits)
    artifact = convert_artifact(OnnxArtifact(onnx.load(changed), {}))
    artifact.save(Path("edited.openvino.zip"), read_spec(changed))
    with open_backend("edited.openvino.zip", device="cpu") as backend:
        result = check_parity(reference, backend, get_tolerance(backend.spec.precision))
    return {check.name for check in result.failures}, str(result.checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, confident_checkpoint: Path, reference: Reference) -> None:
    fault = FAULTS[name]
    failed, text = failed_checks(confident_checkpoint, fault.edits, reference)
    assert fault.must_fail <= failed <= fault.must_fail | fault.may_fail, text


@pytest.mark.slow
def test_a_file_without_a_fault_passes(confident_checkpoint: Path, reference: Reference) -> None:
    unchanged = output_through(lambda: [node("Identity", "raw", "logits")])
    failed, text = failed_checks(confident_checkpoint, [unchanged], reference)
    assert not failed, text
