"""Operators with weights and windows, compared with ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.support.onnx_graphs import assert_same_outputs, graph_of, operator_of, random_weights

SETTINGS = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])

WINDOWS = st.fixed_dictionaries(
    {"kernel_shape": st.lists(st.integers(1, 3), min_size=2, max_size=2)},
    optional={
        "strides": st.lists(st.integers(1, 3), min_size=2, max_size=2),
        "pads": st.lists(st.integers(0, 2), min_size=4, max_size=4),
    },
)


def require_pads_below_window(attributes: dict[str, Any]) -> None:
    """ONNX Runtime refuses padding of pooling that is not smaller than the window."""
    kernel = attributes["kernel_shape"]
    assume(all(pad < window for pad, window in zip(attributes.get("pads", ()), kernel * 2, strict=False)))


@SETTINGS
@given(WINDOWS, st.sampled_from([1, 2, 4]), st.integers(1, 2), st.booleans())
def test_convolutions(attributes: dict[str, Any], groups: int, dilation: int, has_bias: bool) -> None:
    weights = [random_weights(8, 4 // groups, *attributes["kernel_shape"])]
    bias = [random_weights(8)] if has_bias else []
    assert_same_outputs(
        operator_of("Conv", weights + bias, group=groups, dilations=[dilation, dilation], **attributes),
        batch_sizes=[3],
    )


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize("stride", [1, 2])
def test_automatic_padding(mode: str, stride: int) -> None:
    window: dict[str, Any] = {"kernel_shape": [3, 2], "strides": [stride, stride], "auto_pad": mode}
    assert_same_outputs(operator_of("Conv", [random_weights(5, 4, 3, 2)], **window))
    assert_same_outputs(operator_of("MaxPool", **window))
    assert_same_outputs(operator_of("AveragePool", **window))


def test_convolution_in_one_dimension() -> None:
    nodes = [
        helper.make_node("Reshape", ["input", "rows"], ["sequence"]),
        helper.make_node("Conv", ["sequence", "weight"], ["output"], pads=[1, 1]),
    ]
    assert_same_outputs(graph_of(nodes, {"rows": np.array([0, 4, 36]), "weight": random_weights(3, 4, 3)}))


@SETTINGS
@given(WINDOWS, st.integers(0, 1))
def test_max_pooling(attributes: dict[str, Any], ceil_mode: int) -> None:
    require_pads_below_window(attributes)
    assert_same_outputs(operator_of("MaxPool", ceil_mode=ceil_mode, **attributes), batch_sizes=[3])


@SETTINGS
@given(WINDOWS, st.integers(0, 1), st.integers(0, 1))
def test_average_pooling(attributes: dict[str, Any], counts_padding: int, ceil_mode: int) -> None:
    require_pads_below_window(attributes)
    model = operator_of("AveragePool", count_include_pad=counts_padding, ceil_mode=ceil_mode, **attributes)
    assert_same_outputs(model, batch_sizes=[3])


@pytest.mark.parametrize("name", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pooling(name: str) -> None:
    assert_same_outputs(operator_of(name))


@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5), (6,)])
def test_products(shape: tuple[int, ...]) -> None:
    assert_same_outputs(operator_of("MatMul", [random_weights(*shape)]))


def test_products_of_activations() -> None:
    nodes = [
        helper.make_node("Transpose", ["input"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["input", "turned"], ["output"]),
    ]
    assert_same_outputs(graph_of(nodes))


@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (1,)])
@pytest.mark.parametrize(
    "attributes", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}], ids=["plain", "transposed", "scaled"]
)
def test_general_products(bias: tuple[int, ...] | None, attributes: dict[str, Any]) -> None:
    weights = random_weights(5, 144) if "transB" in attributes else random_weights(144, 5)
    constants = {"weights": weights, **({} if bias is None else {"bias": random_weights(*bias)})}
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Gemm", ["flat", *constants], ["output"], **attributes),
    ]
    assert_same_outputs(graph_of(nodes, constants))


def test_batch_normalization() -> None:
    statistics = [random_weights(4), random_weights(4) + 1, random_weights(4), np.square(random_weights(4))]
    assert_same_outputs(operator_of("BatchNormalization", statistics, epsilon=1e-3))


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_normalization(axis: int, has_bias: bool) -> None:
    shape = (4, 6, 6)[axis - 1 if axis > 0 else axis :]
    constants = [random_weights(*shape)] * (2 if has_bias else 1)
    assert_same_outputs(operator_of("LayerNormalization", constants, axis=axis, epsilon=1e-4))


@pytest.mark.parametrize("per_channel", [True, False])
def test_group_and_instance_normalization(per_channel: bool) -> None:
    assert_same_outputs(operator_of("InstanceNormalization", [random_weights(4), random_weights(4)]))
    values = random_weights(4 if per_channel else 2)
    opset = 21 if per_channel else 18
    assert_same_outputs(operator_of("GroupNormalization", [values, values], opset=opset, num_groups=2))


def test_local_response_normalization() -> None:
    assert_same_outputs(operator_of("LRN", size=3, alpha=0.1, beta=0.5, bias=2.0))


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_padding(mode: str) -> None:
    pads = np.array([0, 0, 1, 2, 0, 0, 3, 0])
    value = [np.float32(1.5)] if mode == "constant" else []
    assert_same_outputs(operator_of("Pad", [pads, *value], mode=mode))


def test_padding_of_channels_and_of_named_axes() -> None:
    assert_same_outputs(operator_of("Pad", [np.array([0, 1, 0, 0, 0, 2, 0, 0])]))
    assert_same_outputs(operator_of("Pad", [np.array([1, 2]), np.float32(0), np.array([-1])], opset=18))
    assert_same_outputs(operator_of("Pad", opset=10, pads=[0, 0, 1, 1, 0, 0, -1, 2], value=2.0))


@pytest.mark.parametrize(
    ("mode", "rule", "rounding"),
    [
        ("nearest", "asymmetric", "floor"),
        ("linear", "half_pixel", None),
        ("linear", "align_corners", None),
        ("linear", "pytorch_half_pixel", None),
    ],
)
def test_resizing(mode: str, rule: str, rounding: str | None) -> None:
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": rule}
    if rounding:
        attributes["nearest_mode"] = rounding
    scales = [None, np.array([1, 1, 2, 1.5], np.float32)]
    assert_same_outputs(operator_of("Resize", scales, **attributes))
