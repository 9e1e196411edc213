"""Operators that combine values along axes, compared with ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.support.onnx_graphs import assert_same_outputs, graph_of, operator_of

REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare",
)  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions(name: str, keepdims: int) -> None:
    assert_same_outputs(operator_of(name, [np.array([-1, 1])], opset=18, keepdims=keepdims))


def test_axes_as_attributes_of_older_opsets() -> None:
    assert_same_outputs(operator_of("ReduceMean", opset=11, axes=[2, 3], keepdims=0))
    assert_same_outputs(operator_of("ReduceSum", opset=11, axes=[1]))


@pytest.mark.parametrize("keeps_all", [0, 1])
def test_reductions_without_axes(keeps_all: int) -> None:
    assert_same_outputs(operator_of("ReduceSum", opset=13, noop_with_empty_axes=keeps_all), batch_sizes=[2])


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("opset", "attributes"), [(17, {}), (17, {"axis": 1}), (11, {}), (11, {"axis": 2})])
def test_softmax(name: str, opset: int, attributes: dict[str, Any]) -> None:
    """Before opset 13, it is over all axes from the given one on."""
    assert_same_outputs(operator_of(name, opset=opset, **attributes))


@pytest.mark.parametrize("norm", [1, 2])
def test_normalization_by_a_norm(norm: int) -> None:
    assert_same_outputs(operator_of("LpNormalization", p=norm, axis=1))


def test_the_position_of_the_maximum() -> None:
    nodes = [
        helper.make_node("ArgMax", ["input"], ["position"], axis=1, keepdims=0),
        helper.make_node("Cast", ["position"], ["output"], to=TensorProto.FLOAT),
    ]
    assert_same_outputs(graph_of(nodes), is_exported=True)


def test_the_number_of_elements_from_a_shape() -> None:
    nodes = [
        helper.make_node("Shape", ["input"], ["shape"], start=1),
        helper.make_node("ReduceProd", ["shape"], ["count"], keepdims=1),
        helper.make_node("Shape", ["input"], ["batch"], end=1),
        helper.make_node("Concat", ["batch", "count"], ["flat"], axis=0),
        helper.make_node("Reshape", ["input", "flat"], ["output"]),
    ]
    assert_same_outputs(graph_of(nodes), is_exported=True)
