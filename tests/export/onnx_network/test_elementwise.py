"""Operators that work on each element, compared with ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from cifarx_export.onnx_network.elementwise import ELEMENTWISE
from tests.support.onnx_graphs import assert_same_outputs, graph_of, operator_of, random_weights

POSITIVE = helper.make_node("Abs", ["input"], ["positive"])

UNARY: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "Neg", "Reciprocal", "Relu")),
    *((name, {}) for name in ("Round", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh", "HardSwish", "Mish")),
    *((name, {}) for name in ("Celu", "Elu", "HardSigmoid", "LeakyRelu", "Selu", "ThresholdedRelu")),
    ("Celu", {"alpha": 0.7}),
    ("Elu", {"alpha": 0.3}),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.4}),
    ("LeakyRelu", {"alpha": 0.2}),
    ("Selu", {"alpha": 1.2, "gamma": 0.9}),
    ("ThresholdedRelu", {"alpha": 0.4}),
]


@pytest.mark.parametrize(("name", "attributes"), UNARY, ids=lambda value: value if isinstance(value, str) else "")
def test_operators_of_one_value(name: str, attributes: dict[str, Any]) -> None:
    assert_same_outputs(operator_of(name, opset=18, **attributes))


@pytest.mark.parametrize("name", ["Sqrt", "Log"])
def test_operators_of_positive_values(name: str) -> None:
    assert_same_outputs(graph_of([POSITIVE, helper.make_node(name, ["positive"], ["output"])]))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    assert_same_outputs(operator_of("Gelu", opset=20, approximate=approximate))


@pytest.mark.parametrize("name", ["Add", "Sub", "Mul", "Div", "PRelu", "Max", "Min", "Sum", "Mean"])
def test_operators_of_two_values_broadcast(name: str) -> None:
    assert_same_outputs(operator_of(name, [random_weights(4, 1, 1)]))


@pytest.mark.parametrize("name", ["Max", "Min", "Sum", "Mean"])
def test_operators_of_any_number_of_values(name: str) -> None:
    assert_same_outputs(operator_of(name, [random_weights(4, 6, 6), random_weights(6)]))


def test_powers() -> None:
    assert_same_outputs(operator_of("Pow", [np.float32(2)]))
    assert_same_outputs(
        graph_of([POSITIVE, helper.make_node("Pow", ["positive", "e"], ["output"])], {"e": np.float32(0.5)})
    )


@pytest.mark.parametrize("name", ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
def test_comparisons_and_choices(name: str) -> None:
    nodes = [
        helper.make_node("Round", ["input"], ["whole"]),
        helper.make_node(name, ["whole", "one"], ["condition"]),
        helper.make_node("Where", ["condition", "input", "zero"], ["output"]),
    ]
    assert_same_outputs(graph_of(nodes, {"one": np.float32(1), "zero": np.float32(0)}))


@pytest.mark.parametrize("name", ["And", "Or"])
def test_logic(name: str) -> None:
    nodes = [
        helper.make_node("Greater", ["input", "one"], ["large"]),
        helper.make_node("Less", ["input", "zero"], ["negative"]),
        helper.make_node("Not", ["negative"], ["not negative"]),
        helper.make_node(name, ["large", "not negative"], ["both"]),
        helper.make_node("Where", ["both", "input", "zero"], ["output"]),
    ]
    assert_same_outputs(graph_of(nodes, {"one": np.float32(1), "zero": np.float32(0)}))


@pytest.mark.parametrize("bounds", [(0, 6), (None, 1), (-1, None), (None, None)])
def test_clip_with_bounds_as_inputs(bounds: tuple[float | None, float | None]) -> None:
    assert_same_outputs(operator_of("Clip", [None if bound is None else np.float32(bound) for bound in bounds]))


def test_clip_with_bounds_as_attributes() -> None:
    assert_same_outputs(operator_of("Clip", opset=9, min=0.0, max=6.0))


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL])
def test_casts(kind: int) -> None:
    nodes = [
        helper.make_node("Cast", ["input"], ["cast"], to=kind),
        helper.make_node("Cast", ["cast"], ["output"], to=TensorProto.FLOAT),
    ]
    assert_same_outputs(graph_of(nodes))


def test_integers_are_divided_toward_zero() -> None:
    nodes = [
        helper.make_node("Cast", ["input"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Div", ["whole", "two"], ["half"]),
        helper.make_node("Cast", ["half"], ["output"], to=TensorProto.FLOAT),
    ]
    assert_same_outputs(graph_of(nodes, {"two": np.int64(2)}))


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders(fmod: int) -> None:
    """With `fmod`, the sign is that of the dividend."""
    assert_same_outputs(operator_of("Mod", [np.float32(1.5)], fmod=1))
    nodes = [
        helper.make_node("Cast", ["input"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Mod", ["whole", "three"], ["rest"], fmod=fmod),
        helper.make_node("Cast", ["rest"], ["output"], to=TensorProto.FLOAT),
    ]
    assert_same_outputs(graph_of(nodes, {"three": np.int64(3)}))


def test_a_cast_to_an_unknown_type_is_refused() -> None:
    from cifarx_export.onnx_network.node import Node
    from cifarx_export.onnx_network.values import make_sizes

    node = Node("Cast", ["a"], ["b"], {"to": TensorProto.STRING}, 17)
    with pytest.raises(NotImplementedError, match="Cast to data type 8"):
        ELEMENTWISE["Cast"](node, make_sizes([1]))
