"""The simulation of half precision rounds and overflows as evaluations in float16 and bfloat16 do."""

import re
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from cifarx_export.formats.half_types import BFLOAT16, FLOAT16, HALF_TYPES, HalfType
from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.formats.onnx.fp16 import convert_model_to_fp16, lift_constants
from cifarx_export.formats.onnx.half_precision import (
    ReferenceBatch,
    check_half_precision,
    layer_name,
    simulate_half_precision,
)
from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource
from cifarx_export.parity.checks import Check
from cifarx_serve.progress import silent
from cifarx_serve.spec import Precision
from tests.support.int8_networks import SPEC, color_blobs, export_fp32, residual_network, run_model

FP16_SPEC = msgspec.structs.replace(SPEC, precision="fp16")


def inputs(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).random((count, 3, 32, 32), np.float32)


def in_float16(model: ModelProto) -> ModelProto:
    return convert_model_to_fp16(lift_constants(model))[0]


def compared(model: ModelProto, *batches: np.ndarray) -> list[ReferenceBatch]:
    return [(batch, run_model(model, batch)) for batch in batches]


def checked(model: ModelProto, precision: Precision, images: np.ndarray) -> list[Check]:
    """Check a model in half precision against itself in float32."""
    batches = compared(model, images)
    artifact = in_float16(copied(model)) if precision == "fp16" else model
    return check_half_precision(artifact, precision, batches, SPEC)


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return export_fp32(residual_network())


def copied(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


@pytest.fixture(scope="module")
def overflowing() -> ModelProto:
    """A network with activations that are 100,000 times as large between its first and its last layer."""
    module = residual_network()
    with torch.no_grad():
        module.stem.weight *= 1e5
        module.head.weight /= 1e5
    return export_fp32(module)


def reference(model: ModelProto, batch: np.ndarray) -> np.ndarray:
    """Return the logits of a float16 model as ONNX defines its operators."""
    with np.errstate(all="ignore"):
        outputs: Any = ReferenceEvaluator(model).run(None, {"input": batch})
    return np.asarray(outputs[0])


def test_the_simulation_computes_in_float16(model: ModelProto) -> None:
    artifact = in_float16(copied(model))
    simulation = simulate_half_precision(artifact, FLOAT16).model
    onnx.checker.check_model(simulation)
    half, fp32 = run_model(simulation, inputs()), run_model(model, inputs())
    error = np.abs(half - fp32).max()
    assert error > 1e-5 * np.abs(fp32).max()
    # numpy's sums of float16 have another order, so the results are only as close as two runs in float16 are.
    assert np.abs(half - reference(artifact, inputs())).max() < 8 * error


def test_the_simulation_computes_in_bfloat16_as_pytorch_does(model: ModelProto) -> None:
    simulation = simulate_half_precision(model, BFLOAT16).model
    onnx.checker.check_model(simulation)
    half, fp32 = run_model(simulation, inputs()), run_model(model, inputs())
    error = np.abs(half - fp32).max()
    assert error > 1e-4 * np.abs(fp32).max()
    with torch.no_grad():
        rounded = residual_network().bfloat16()(torch.from_numpy(inputs()).bfloat16()).float().numpy()
    assert np.abs(half - rounded).max() < 4 * error


@pytest.mark.parametrize(("half", "dtype"), [(FLOAT16, torch.float16), (BFLOAT16, torch.bfloat16)])
def test_arithmetic_is_that_of_the_type_bit_for_bit(half: HalfType, dtype: torch.dtype) -> None:
    class Arithmetic(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return ((images * 3.1 + 0.7) * images).flatten(1)[:, :10]

    model = export_fp32(Arithmetic())
    simulation = simulate_half_precision(in_float16(copied(model)) if half is FLOAT16 else model, half).model
    images = torch.from_numpy(inputs()).to(dtype)
    constants = torch.tensor([3.1, 0.7], dtype=dtype)
    expected = ((images * constants[0] + constants[1]) * images).flatten(1)[:, :10]
    np.testing.assert_array_equal(run_model(simulation, inputs()), expected.float().numpy())


def test_an_overflow_is_that_of_float16(overflowing: ModelProto) -> None:
    assert np.isfinite(run_model(overflowing, inputs())).all()
    artifact = in_float16(copied(overflowing))
    simulation = simulate_half_precision(artifact, FLOAT16).model
    for logits in (run_model(simulation, inputs()), reference(artifact, inputs())):
        assert not np.isfinite(logits).all()


def test_the_model_is_not_modified(model: ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    simulate_half_precision(model, BFLOAT16)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("precision", "name", "minimum"), [("fp16", "float16", "99.9%"), ("bf16", "bfloat16", "99.5%")]
)
def test_a_network_in_range_passes(model: ModelProto, precision: Precision, name: str, minimum: str) -> None:
    artifact = in_float16(copied(model)) if precision == "fp16" else model
    in_range, agreement = check_half_precision(artifact, precision, compared(model, inputs(), inputs(5)), SPEC)
    assert in_range.passed
    assert agreement.passed
    assert agreement.found.endswith(f"of 13 images with activations rounded to {name} (minimum {minimum})")


def test_the_layer_that_overflows_is_named(overflowing: ModelProto) -> None:
    [check] = checked(overflowing, "fp16", inputs())
    assert not check.passed
    assert check.found.startswith("stem (Conv) reaches ")
    assert check.found.endswith(" and overflows on a GPU: the largest float16 is 65504")


def test_what_overflows_float16_fits_into_bfloat16(overflowing: ModelProto) -> None:
    in_range, _ = checked(overflowing, "bf16", inputs())
    assert in_range.name == "bfloat16 range"
    assert in_range.passed
    assert " of 3.38953e+38 in " in in_range.found


class CancelingNetwork(nn.Module):
    """Subtracts two large numbers: their difference is the color, which float16 cannot represent beside them."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return ((means + 3000.0) - 3000.0).repeat(1, 4)[:, :10]


class AccumulatingNetwork(nn.Module):
    """Sums the pixels of each color one by one: beside the sum, half precision loses what is added to it."""

    def forward(self, images: Tensor) -> Tensor:
        total = images[:, :, 0, 0] * 0
        for column in range(12):
            total = total + images[:, :, 0, column] + 1000
        return total.repeat(1, 4)[:, :10]


@pytest.mark.parametrize(("network", "operator"), [(CancelingNetwork(), "Sub"), (AccumulatingNetwork(), "Add")])
def test_predictions_that_rounding_changes_fail(network: nn.Module, operator: str) -> None:
    model = export_fp32(network)
    for precision in HALF_TYPES:
        in_range, agreement = checked(model, precision, inputs(64))
        assert in_range.passed
        assert not agreement.passed
        pattern = rf"; the errors grow most in \S+ \({operator}\), from \S+ to \S+ of its values$"
        assert re.search(pattern, agreement.found)


def test_a_model_that_cannot_be_simulated_fails(model: ModelProto) -> None:
    unknown = copied(model)
    unknown.graph.node[0].op_type = "Unknown"
    [check] = check_half_precision(unknown, "bf16", compared(model, inputs()), SPEC)
    assert not check.passed
    assert check.found.startswith("cannot be simulated: ")


def test_names_of_layers() -> None:
    node = onnx.helper.make_node("Conv", ["a", "layer1.conv1.weight"], ["b"], name="node_conv")
    assert layer_name(node) == "node_conv (Conv)"
    assert layer_name(node, {"layer1.conv1.weight"}) == "layer1.conv1 (Conv)"
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d_1']"
    assert layer_name(node) == "layer1.0.conv1 (Conv)"
    entry.value = "['', 'add_3']"
    assert layer_name(node) == "node_conv (Conv)"


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1, 1e5])
def test_the_checks_belong_to_the_artifact(factor: float) -> None:
    module = residual_network()
    with torch.no_grad():
        module.stem.weight *= factor
    source = ConversionSource(lambda: module, FP16_SPEC, NO_OPTIONS, color_blobs, silent, test_images=color_blobs(100))
    checks = next(convert_to_onnx(source)).checks
    assert checks[0].name == "float16 range"
    assert checks[0].passed == (factor == 1)
