"""Operators that move values and compute shapes, compared with ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.support.onnx_graphs import assert_same_outputs, graph_of, operator_of

FLOAT = TensorProto.FLOAT


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ([0, -1], {}),
        ([-1, 36], {}),
        ([0, 4, 9, 4], {}),
        ([0, 0, -1], {"allowzero": 0}),
        ([-1, 4, 6, 6], {"allowzero": 1}),
    ],
)
def test_reshaping(shape: list[int], attributes: dict[str, Any]) -> None:
    assert_same_outputs(operator_of("Reshape", [np.array(shape)], **attributes))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_flattening(axis: int) -> None:
    assert_same_outputs(operator_of("Flatten", axis=axis))


def test_the_usual_ways_to_flatten_with_the_batch_size_of_the_images() -> None:
    nodes = [
        helper.make_node("Shape", ["input"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["batch list"]),
        helper.make_node("Concat", ["batch list", "rest"], ["new shape"], axis=0),
        helper.make_node("Reshape", ["input", "new shape"], ["output"]),
    ]
    constants = {"first": np.int64(0), "axis": np.array([0]), "rest": np.array([-1])}
    assert_same_outputs(graph_of(nodes, constants), is_exported=True)


def test_arithmetic_with_the_batch_size() -> None:
    """As transformers fold windows into the batch and back."""
    nodes = [
        helper.make_node("Shape", ["input"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "one"], ["batch"]),
        helper.make_node("Mul", ["batch", "four"], ["windows"]),
        helper.make_node("Concat", ["windows", "window"], ["folded"], axis=0),
        helper.make_node("Reshape", ["input", "folded"], ["in windows"]),
        helper.make_node("Softmax", ["in windows"], ["mapped"]),
        helper.make_node("Shape", ["mapped"], ["mapped shape"]),
        helper.make_node("Slice", ["mapped shape", "zero", "one"], ["count"]),
        helper.make_node("Div", ["count", "four"], ["batch again"]),
        helper.make_node("Concat", ["batch again", "minus one"], ["unfolded"], axis=0),
        helper.make_node("Reshape", ["mapped", "unfolded"], ["output"]),
    ]
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "four": np.array([4]),
        "window": np.array([36]),
        "minus one": np.array([-1]),
    }
    assert_same_outputs(graph_of(nodes, constants), is_exported=True)


def test_a_token_is_repeated_for_each_image() -> None:
    """As vision transformers add the class token."""
    nodes = [
        helper.make_node("Shape", ["input"], ["batch"], end=1),
        helper.make_node(
            "ConstantOfShape", ["three"], ["ones"], value=helper.make_tensor("v", TensorProto.INT64, [1], [1])
        ),
        helper.make_node("Concat", ["batch", "token shape"], ["shape"], axis=0),
        helper.make_node("Equal", ["shape", "minus ones"], ["is open"]),
        helper.make_node("Where", ["is open", "ones", "shape"], ["target"]),
        helper.make_node("Expand", ["token", "target"], ["tokens"]),
        helper.make_node("Reshape", ["input", "rows"], ["patches"]),
        helper.make_node("Concat", ["tokens", "patches"], ["output"], axis=1),
    ]
    constants = {
        "three": np.array([3]),
        "token shape": np.array([-1, -1]),
        "minus ones": np.array([-1, -1, -1]),
        "token": np.arange(36, dtype=np.float32).reshape(1, 1, 36),
        "rows": np.array([0, 4, 36]),
    }
    assert_same_outputs(graph_of(nodes, constants), is_exported=True)


def test_transposition() -> None:
    assert_same_outputs(operator_of("Transpose", perm=[0, 2, 3, 1]))
    assert_same_outputs(operator_of("Transpose"))


def test_axes_of_size_one() -> None:
    pooled = helper.make_node("GlobalAveragePool", ["input"], ["pooled"])
    for squeeze in (
        helper.make_node("Squeeze", ["pooled", "axes"], ["output"]),
        helper.make_node("Squeeze", ["pooled", "negative"], ["output"]),
    ):
        constants = {"axes": np.array([2, 3]), "negative": np.array([-1, -2])}
        assert_same_outputs(graph_of([pooled, squeeze], {name: constants[name] for name in squeeze.input[1:]}))
    assert_same_outputs(graph_of([pooled, helper.make_node("Squeeze", ["pooled"], ["output"], axes=[3])], opset=11))
    assert_same_outputs(operator_of("Unsqueeze", [np.array([-1, 0])]))
    assert_same_outputs(operator_of("Unsqueeze", opset=11, axes=[1, 3]))


@given(st.integers(-8, 8), st.integers(-8, 8), st.sampled_from([1, 2, 3, -1, -2]), st.sampled_from([1, 2, -1]))
@settings(max_examples=25, deadline=None)
def test_slices(start: int, end: int, step: int, axis: int) -> None:
    constants = [np.array([number]) for number in (start, end, axis, step)]
    assert_same_outputs(operator_of("Slice", constants), batch_sizes=[2])


def test_slices_to_the_end_and_of_several_axes() -> None:
    assert_same_outputs(operator_of("Slice", opset=9, starts=[1, 2], ends=[2**63 - 1, -1], axes=[1, 3]))
    ends = [np.array([3]), np.array([-(2**63)]), np.array([2]), np.array([-1])]
    assert_same_outputs(operator_of("Slice", ends))


@pytest.mark.parametrize("index", [np.int64(1), np.int64(-1), np.array([2, 0, -1]), np.array([[0, 1], [3, -2]])])
def test_gathering(index: Any) -> None:
    assert_same_outputs(operator_of("Gather", [index], axis=1))


def test_gathering_at_computed_positions() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["largest"], keepdims=0, axes=[1, 2, 3]),
        helper.make_node("Clip", ["largest", "zero", "one"], ["bounded"]),
        helper.make_node("Cast", ["bounded"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["output"]),
    ]
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_same_outputs(graph_of(nodes, {"table": table, "zero": np.float32(0), "one": np.float32(1)}))


def test_gathering_of_several_axes() -> None:
    table = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nodes = [
        helper.make_node("GatherND", ["table", "places"], ["row"]),
        helper.make_node("ReduceSum", ["row"], ["sum"]),
        helper.make_node("Add", ["input", "sum"], ["output"]),
    ]
    assert_same_outputs(graph_of(nodes, {"table": table, "places": np.array([[0, 2], [1, 0]])}))


def test_scattering() -> None:
    """As windowed transformers write the mask of their windows."""
    nodes = [
        helper.make_node("Relu", ["input"], ["positive"]),
        helper.make_node("Transpose", ["positive"], ["turned"], perm=[1, 2, 3, 0]),
        helper.make_node("ReduceMean", ["turned"], ["data"], axes=[3], keepdims=0),
        helper.make_node("ScatterND", ["data", "places", "updates"], ["output"]),
    ]
    constants = {"places": np.array([[0, 1], [3, 5]]), "updates": np.full((2, 6), 7, np.float32)}
    assert_same_outputs(graph_of(nodes, constants), is_exported=True)


def test_splitting_and_joining() -> None:
    for opset, inputs, attributes, outputs in (
        (17, ["sizes"], {}, 3),
        (17, [], {}, 2),
        (18, [], {"num_outputs": 2}, 2),
        (11, [], {"split": [3, 1]}, 2),
    ):
        parts = [f"part {number}" for number in range(outputs)]
        nodes = [
            helper.make_node("Split", ["input", *inputs], parts, axis=1, **attributes),
            helper.make_node("Concat", list(reversed(parts)), ["output"], axis=1),
        ]
        assert_same_outputs(graph_of(nodes, {"sizes": np.array([1, 1, 2])} if inputs else {}, opset))


def test_repetition() -> None:
    assert_same_outputs(operator_of("Tile", [np.array([1, 2, 1, 3])]))
    assert_same_outputs(operator_of("Expand", [np.array([1, 1, 1, 1, 1])]))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_moving_channels_into_space_and_back(mode: str) -> None:
    assert_same_outputs(operator_of("DepthToSpace", blocksize=2, mode=mode))
    assert_same_outputs(operator_of("SpaceToDepth", blocksize=2))


def test_einstein_summation() -> None:
    assert_same_outputs(
        graph_of([helper.make_node("Einsum", ["input", "input"], ["output"], equation="bchw,bdhw->bcd")])
    )


def test_a_range_of_positions() -> None:
    nodes = [
        helper.make_node("Range", ["zero", "six", "one"], ["positions"]),
        helper.make_node("Cast", ["positions"], ["as floats"], to=FLOAT),
        helper.make_node("Add", ["input", "as floats"], ["output"]),
    ]
    assert_same_outputs(graph_of(nodes, {"zero": np.int64(0), "six": np.int64(6), "one": np.int64(1)}))


def test_the_number_of_elements() -> None:
    nodes = [
        helper.make_node("Size", ["input"], ["count"]),
        helper.make_node("Div", ["count", "image"], ["batch"]),
        helper.make_node("Reshape", ["batch", "list"], ["batch list"]),
        helper.make_node("Concat", ["batch list", "minus one"], ["shape"], axis=0),
        helper.make_node("Reshape", ["input", "shape"], ["output"]),
    ]
    constants = {"image": np.int64(144), "list": np.array([1]), "minus one": np.array([-1])}
    assert_same_outputs(graph_of(nodes, constants), is_exported=True)


def test_dropout_is_left_out() -> None:
    assert_same_outputs(operator_of("Dropout"))
