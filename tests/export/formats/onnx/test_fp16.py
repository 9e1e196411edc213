"""ONNX models in float16: the same inputs and outputs, almost the same logits, and no redundant casts."""

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

from cifarx_export.formats.onnx.fp16 import convert_model_to_fp16


def export_fp32(module: nn.Module) -> ModelProto:
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
def fp32_model() -> ModelProto:
    return export_fp32(network())


def copy_of(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def run_model(model: ModelProto, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input": batch})[0])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_logits_are_close_to_float32(fp32_model: ModelProto, size: int) -> None:
    model, _ = convert_model_to_fp16(copy_of(fp32_model))
    onnx.checker.check_model(model, full_check=True)
    batch = np.random.default_rng(size).random((size, 3, 8, 6), np.float32)
    logits, expected = run_model(model, batch), run_model(fp32_model, batch)
    assert (logits.dtype, logits.shape) == (np.float32, (size, 5))
    assert not np.array_equal(logits, expected)
    np.testing.assert_allclose(logits, expected, rtol=1e-2, atol=2e-3)


def test_inputs_and_outputs_keep_their_names_and_types(fp32_model: ModelProto) -> None:
    model, _ = convert_model_to_fp16(copy_of(fp32_model))
    assert [(value.name, value.type) for value in (*model.graph.input, *model.graph.output)] == [
        (value.name, value.type) for value in (*fp32_model.graph.input, *fp32_model.graph.output)
    ]


def test_operators_that_stay_float32_are_reported_and_the_rest_is_float16(fp32_model: ModelProto) -> None:
    model, facts = convert_model_to_fp16(copy_of(fp32_model))
    assert facts == {"fp32 ops": "LayerNormalization, Softmax"}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        weights = {types[name] for name in node.input if name in types} - {TensorProto.INT64}
        assert weights <= {TensorProto.FLOAT if node.op_type == "LayerNormalization" else TensorProto.FLOAT16}


def test_no_cast_undoes_another(fp32_model: ModelProto) -> None:
    """There are four: after the input, before and after the two layers in float32, and before the output."""
    model, _ = convert_model_to_fp16(copy_of(fp32_model))
    assert Counter(node.op_type for node in model.graph.node)["Cast"] == 4
    written = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Cast":
            assert written.get(node.input[0]) != "Cast"


def test_converting_again_gives_the_same_bytes(fp32_model: ModelProto) -> None:
    first, second = (
        convert_model_to_fp16(copy_of(fp32_model))[0].SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_a_last_node_in_float32_writes_the_logits_directly() -> None:
    model, facts = convert_model_to_fp16(export_fp32(nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.Softmax(1))))
    onnx.checker.check_model(model, full_check=True)
    assert facts == {"fp32 ops": "Softmax"}
    [last] = [node for node in model.graph.node if "logits" in node.output]
    assert last.op_type == "Softmax"
    np.testing.assert_allclose(run_model(model, np.ones((2, 3, 8, 6), np.float32)).sum(1), 1, rtol=1e-5)


def test_a_model_entirely_in_float16_reports_no_operators() -> None:
    model, facts = convert_model_to_fp16(export_fp32(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())))
    assert facts == {}
    assert Counter(node.op_type for node in model.graph.node)["Cast"] == 2


def scaling_model(factor: float, steps: int) -> ModelProto:
    """Return a model that multiplies and divides by `factor` the given number of times."""
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
def test_a_constant_outside_the_range_keeps_its_nodes_in_float32(factor: float, steps: int) -> None:
    model, facts = convert_model_to_fp16(scaling_model(factor, steps))
    onnx.checker.check_model(model, full_check=True)
    assert facts == {"fp32 ops": "Div, Mul"}
    batch = np.random.default_rng(0).random((3, 3, 2, 2), np.float32)
    np.testing.assert_allclose(run_model(model, batch), batch.reshape(3, 12), rtol=1e-3)


def test_a_constant_in_range_is_converted() -> None:
    assert convert_model_to_fp16(scaling_model(2.0, 1))[1] == {}
