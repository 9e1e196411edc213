"""The simulation of float16 rounds and overflows as ONNX's own evaluation in float16 does."""

from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.formats.onnx.fp16 import convert_model_to_fp16, fp32_nodes, lift_constants
from cifarx_export.formats.onnx.half_precision import check_half_precision, layer_name, simulate_half_precision
from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource
from cifarx_serve.progress import silent
from tests.support.int8_networks import SPEC, color_blobs, export_fp32, residual_network, run_model

FP16_SPEC = msgspec.structs.replace(SPEC, precision="fp16")


def inputs(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).random((count, 3, 32, 32), np.float32)


def kept(model: ModelProto) -> list[str]:
    return [node.name for node in fp32_nodes(model)]


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return lift_constants(export_fp32(residual_network()))


def scaled(factor: float) -> ModelProto:
    """Return the model with activations that are `factor` times as large from the first layer on."""
    module = residual_network()
    with torch.no_grad():
        module.stem.weight *= factor
        module.head.weight /= factor
    return lift_constants(export_fp32(module))


def reference(model: ModelProto, batch: np.ndarray) -> np.ndarray:
    """Return the logits of the float16 model as ONNX defines its operators."""
    copy = ModelProto()
    copy.CopyFrom(model)
    with np.errstate(all="ignore"):
        outputs: Any = ReferenceEvaluator(convert_model_to_fp16(copy)[0]).run(None, {"input": batch})
    return np.asarray(outputs[0])


def test_the_simulation_computes_in_float16(model: ModelProto) -> None:
    simulation = simulate_half_precision(model, kept(model)).model
    onnx.checker.check_model(simulation)
    half, fp32 = run_model(simulation, inputs()), run_model(model, inputs())
    error = np.abs(half - fp32).max()
    assert error > 1e-5 * np.abs(fp32).max()
    # numpy's sums of float16 have another order, so the results are only as close as two runs in float16 are.
    assert np.abs(half - reference(model, inputs())).max() < 8 * error


def test_an_overflow_is_that_of_float16() -> None:
    model = scaled(1e5)
    assert np.isfinite(run_model(model, inputs())).all()
    for logits in (run_model(simulate_half_precision(model, kept(model)).model, inputs()), reference(model, inputs())):
        assert not np.isfinite(logits).all()


def test_the_model_is_not_modified(model: ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    simulate_half_precision(model, kept(model))
    assert model.SerializeToString(deterministic=True) == before


def test_a_network_in_range_passes(model: ModelProto) -> None:
    in_range, agreement = check_half_precision(model, kept(model), [inputs(), inputs(5)], FP16_SPEC)
    assert in_range.passed
    assert agreement.passed
    assert agreement.found.endswith("of 13 images with activations rounded to float16 (minimum 99.9%)")


def test_the_layer_that_overflows_is_named() -> None:
    model = scaled(1e5)
    [check] = check_half_precision(model, kept(model), [inputs()], FP16_SPEC)
    assert not check.passed
    assert check.found.startswith("stem (Conv) reaches ")
    assert check.found.endswith(" and overflows on a GPU: the largest float16 is 65504")


class CancelingNetwork(nn.Module):
    """Subtracts two large numbers: their difference is the color, which float16 cannot represent beside them."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return ((means + 3000.0) - 3000.0).repeat(1, 4)[:, :10]


def test_predictions_that_rounding_changes_fail() -> None:
    model = lift_constants(export_fp32(CancelingNetwork()))
    in_range, agreement = check_half_precision(model, kept(model), [inputs(64)], FP16_SPEC)
    assert in_range.passed
    assert not agreement.passed


def test_names_of_layers() -> None:
    node = onnx.helper.make_node("Conv", ["a"], ["b"], name="node_conv")
    assert layer_name(node) == "node_conv (Conv)"
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d_1']"
    assert layer_name(node) == "layer1.0.conv1 (Conv)"
    entry.value = "['', 'add_3']"
    assert layer_name(node) == "node_conv (Conv)"


@pytest.mark.parametrize("factor", [1, 1e5])
def test_the_checks_belong_to_the_artifact(factor: float) -> None:
    module = residual_network()
    with torch.no_grad():
        module.stem.weight *= factor
    source = ConversionSource(lambda: module, FP16_SPEC, NO_OPTIONS, color_blobs, silent, test_images=color_blobs(100))
    checks = next(convert_to_onnx(source)).checks
    assert checks[0].name == "float16 range"
    assert checks[0].passed == (factor == 1)
