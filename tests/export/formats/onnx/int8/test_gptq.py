"""GPTQ must preserve the outputs of a layer better than rounding to the nearest integer."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cifarx_export.formats.onnx.int8 import gptq


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(64, 96), st.integers(2, 200))
def test_gptq_beats_rounding_to_the_nearest(seed: int, outputs: int, inputs: int) -> None:
    """Over all outputs together. For a single output it can be worse."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(outputs, inputs, generator=generator)
    rows = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    scales = weights.abs().amax(1) / gptq.QUANT_MAX
    levels = gptq._quantize_columns(weights, scales, rows.T @ rows)
    nearest = (weights / scales[:, None]).round()
    assert torch.equal(levels, levels.round())
    assert levels.abs().max() <= gptq.QUANT_MAX

    def output_error(integers: torch.Tensor) -> float:
        return float(((integers * scales[:, None] - weights) @ rows.T).square().sum())

    assert output_error(levels) <= 1.1 * output_error(nearest)


@pytest.mark.parametrize(
    ("attributes", "supported"), [({}, True), ({"auto_pad": "SAME_UPPER"}, False), ({"group": 3}, False)]
)
def test_the_input_of_a_convolution_without_a_kernel_shape(attributes: dict[str, Any], supported: bool) -> None:
    """The shape of the kernel is optional in ONNX, and the only layer of a network reads its input."""
    images = np.random.default_rng(0).random((4, 3, 5, 5), np.float32)
    weights = np.zeros((6, 1 if "group" in attributes else 3, 3, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "w"], ["y"], name="conv", **attributes)],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = gptq._compute_hessians(model, images)
    assert [node.name for node, _ in found] == ["conv"] * supported
    rows = torch.nn.functional.unfold(torch.from_numpy(images), 3).transpose(1, 2).reshape(-1, 27)
    for _, hessian in found:
        torch.testing.assert_close(hessian, rows.T @ rows)
