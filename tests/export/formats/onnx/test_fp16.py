"""ONNX in float16: the same inputs and outputs, the same answers nearly, no casts to and fro."""

import io
import warnings
from collections import Counter
from contextlib import redirect_stdout

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from cifarx_export.formats.onnx.fp16 import to_half_precision


def exported(module: nn.Module) -> ModelProto:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (torch.rand(2, 3, 8, 6),),
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: "batch"},),
            input_names=["input"],
            output_names=["logits"],
            opset_version=18,
        )
    assert program is not None
    return program.model_proto


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(192),
        nn.Softmax(1),
        nn.Linear(192, 5),
    )


@pytest.fixture(scope="module")
def single() -> ModelProto:
    return exported(network())


def copied(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def answers(model: ModelProto, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input": batch})[0])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_it_nearly_answers_as_the_model(single: ModelProto, size: int) -> None:
    half, _ = to_half_precision(copied(single))
    onnx.checker.check_model(half, full_check=True)
    batch = np.random.default_rng(size).random((size, 3, 8, 6), np.float32)
    logits, expected = answers(half, batch), answers(single, batch)
    assert (logits.dtype, logits.shape) == (np.float32, (size, 5))
    assert not np.array_equal(logits, expected)
    np.testing.assert_allclose(logits, expected, rtol=1e-2, atol=2e-3)


def test_the_ports_are_the_same(single: ModelProto) -> None:
    half, _ = to_half_precision(copied(single))
    assert [(port.name, port.type) for port in (*half.graph.input, *half.graph.output)] == [
        (port.name, port.type) for port in (*single.graph.input, *single.graph.output)
    ]


def test_what_stays_float32_is_told_and_the_rest_is_half(single: ModelProto) -> None:
    half, facts = to_half_precision(copied(single))
    assert facts == {"fp32 ops": "LayerNormalization, Softmax"}
    of = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    for node in half.graph.node:
        weights = {of[name] for name in node.input if name in of} - {TensorProto.INT64}
        assert weights <= {TensorProto.FLOAT if node.op_type == "LayerNormalization" else TensorProto.FLOAT16}


def test_no_cast_leads_back(single: ModelProto) -> None:
    """In at the input, out for the two that stay, which share theirs, in again, and out at the output."""
    half, _ = to_half_precision(copied(single))
    assert Counter(node.op_type for node in half.graph.node)["Cast"] == 4
    written = {name: node.op_type for node in half.graph.node for name in node.output}
    for node in half.graph.node:
        if node.op_type == "Cast":
            assert written.get(node.input[0]) != "Cast"


def test_the_same_model_gives_the_same_bytes(single: ModelProto) -> None:
    first, second = (to_half_precision(copied(single))[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_a_last_node_that_stays_float32_writes_the_logits_itself() -> None:
    half, facts = to_half_precision(exported(nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.Softmax(1))))
    onnx.checker.check_model(half, full_check=True)
    assert facts == {"fp32 ops": "Softmax"}
    [last] = [node for node in half.graph.node if "logits" in node.output]
    assert last.op_type == "Softmax"
    np.testing.assert_allclose(answers(half, np.ones((2, 3, 8, 6), np.float32)).sum(1), 1, rtol=1e-5)


def test_a_model_that_is_half_throughout_has_nothing_to_tell() -> None:
    half, facts = to_half_precision(exported(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())))
    assert facts == {}
    assert Counter(node.op_type for node in half.graph.node)["Cast"] == 2


def scaled(factor: float, steps: int) -> ModelProto:
    """Multiplies by `factor` and then by its inverse, each read by so many nodes."""
    nodes = []
    last = "input"
    for step in range(steps):
        nodes += [
            helper.make_node("Mul", [last, "factor"], [f"up{step}"], name=f"mul{step}"),
            helper.make_node("Div", [f"up{step}", "factor"], [f"down{step}"], name=f"div{step}"),
        ]
        last = f"down{step}"
    nodes.append(helper.make_node("Flatten", [last], ["logits"], name="flatten"))
    value = numpy_helper.from_array(np.array(factor, np.float32), "factor")
    graph = helper.make_graph(
        nodes,
        "scaled",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 12])],
        [value],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("factor", [1e6, -1e9, 1e-12])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_constant_that_float16_cannot_say_keeps_its_nodes_float32(factor: float, steps: int) -> None:
    half, facts = to_half_precision(scaled(factor, steps))
    onnx.checker.check_model(half, full_check=True)
    assert facts == {"fp32 ops": "Div, Mul"}
    batch = np.random.default_rng(0).random((3, 3, 2, 2), np.float32)
    np.testing.assert_allclose(answers(half, batch), batch.reshape(3, 12), rtol=1e-3)


def test_a_constant_that_float16_can_say_does_not() -> None:
    assert to_half_precision(scaled(2.0, 1))[1] == {}
