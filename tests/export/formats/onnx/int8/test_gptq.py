"""GPTQ of ONNX models."""

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cifarx_export.formats.onnx.int8 import gptq


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
