import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from cifarx_export.adoption.onnx_graph import Interface, connect, free_batch_size


def model_of(nodes: list[NodeProto], batch: int | str, domain: str = "") -> ModelProto:
    """Return a model from `x` to `y` with a weight and two constant shapes."""
    weights = {"bias": np.arange(12, dtype=np.float32), "row": np.array([1, 12]), "open": np.array([1, -1])}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 12])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, 17)], ir_version=8)


def connected(model: ModelProto, batch: int | None = None) -> ModelProto:
    return connect(model, Interface(TensorProto.FLOAT, "y", "logits", 12, batch))


def run(model: ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: np.ndarray = session.run(None, {"input": images})[0]
    return outputs


def test_the_other_name_of_the_domain_of_onnx_is_replaced() -> None:
    branch = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["z"], domain="ai.onnx")],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    condition = helper.make_node("Constant", [], ["c"], domain="ai.onnx", value=numpy_helper.from_array(np.array(True)))
    choice = helper.make_node("If", ["c"], ["y"], domain="ai.onnx", then_branch=branch, else_branch=branch)
    model = connected(model_of([condition, choice], "n", "ai.onnx"))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert "ai.onnx" not in str(model)
    images = np.random.default_rng(0).random((2, 3, 2, 2), np.float32)
    assert np.array_equal(run(model, images), images.reshape(2, 12))


def test_every_node_has_its_own_name() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="same"),
        helper.make_node("Neg", ["a"], ["b"], name="same"),
        helper.make_node("Abs", ["b"], ["c"], name="own"),
        helper.make_node("Flatten", ["c"], ["y"]),
    ]
    names = [node.name for node in connected(model_of(nodes, "n")).graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert "own" in names


@pytest.mark.parametrize("shape", ["row", "open"])
def test_the_shape_of_weights_is_no_batch_size(shape: str) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", shape], ["flat"]),
        helper.make_node("Reshape", ["bias", shape], ["line"]),
        helper.make_node("Add", ["flat", "line"], ["y"]),
    ]
    model = model_of(nodes, 1)
    free_batch_size(model, 1)
    images = np.random.default_rng(0).random((5, 3, 2, 2), np.float32)
    assert np.array_equal(run(connected(model), images), images.reshape(5, 12) + np.arange(12, dtype=np.float32))
