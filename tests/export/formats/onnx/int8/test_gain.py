"""A model that int8 gains nothing for is found."""

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from cifarx_export.formats.int8.calibration import Ranges
from cifarx_export.formats.int8.gain import MIN_GAIN
from cifarx_export.formats.onnx.constant_folding import fold_constants
from cifarx_export.formats.onnx.int8.gain import check_gain, int8_share
from cifarx_export.formats.onnx.int8.graph import insert_qdq, tensors_to_calibrate
from cifarx_export.formats.onnx.int8.layers import macs_per_image, nodes_with_weights
from tests.support.int8_networks import export_fp32, residual_network


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return fold_constants(export_fp32(residual_network()))


def quantize(model: ModelProto, fp32_nodes: list[str]) -> ModelProto:
    ranges: Ranges = {name: (np.array(-4, np.float32), np.array(4, np.float32)) for name in tensors_to_calibrate(model)}
    return insert_qdq(model, ranges, fp32_nodes)


def test_the_share_is_that_of_the_multiplications(model: ModelProto) -> None:
    macs, layers = macs_per_image(model), [node.name for node in nodes_with_weights(model)]
    total = sum(macs.values())
    assert int8_share(quantize(model, []), macs) == 1
    assert int8_share(quantize(model, layers), macs) == 0
    assert int8_share(quantize(model, layers[:1]), macs) == pytest.approx(1 - macs[layers[0]] / total)


def test_a_quantized_model_has_gained(model: ModelProto) -> None:
    check = check_gain(quantize(model, []), model, macs_per_image(model))
    assert check.passed
    assert check.found.startswith("100% of the multiplications in int8, ")


def test_a_model_with_every_layer_in_fp32_has_gained_nothing(model: ModelProto) -> None:
    layers = [node.name for node in nodes_with_weights(model)]
    check = check_gain(quantize(model, layers), model, macs_per_image(model))
    assert not check.passed
    assert check.found.startswith("0% of the multiplications in int8, ")
    assert check.found.endswith(": use --precision fp32 or fp16")


def linear_model(weights: np.ndarray) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weights"], ["logits"], name="layer")],
        "linear",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", len(weights)])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(("rows", "gained"), [(100, False), (99, False), (90, True)])
def test_a_smaller_file_is_a_gain(rows: int, gained: bool) -> None:
    original, other = linear_model(np.zeros((100, 500), np.float32)), linear_model(np.zeros((rows, 500), np.float32))
    assert check_gain(other, original, {"layer": 100}).passed == gained
    assert 0.01 < MIN_GAIN < 0.1
