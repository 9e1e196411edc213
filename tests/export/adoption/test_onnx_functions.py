from pathlib import Path

import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from cifarx_export.adoption.adopt import adopt
from cifarx_export.adoption.onnx_functions import inline_functions
from cifarx_serve.errors import ModelFileError

FILE = Path("net.onnx")
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]


def call(function: str, source: str, result: str) -> NodeProto:
    return helper.make_node(function, [source], [result], domain="own" if function.startswith("F") else "")


def model_of(bodies: list[list[str]]) -> ModelProto:
    """Return a model that calls the last of several functions. Each one calls others, F0 and so on, in a row."""
    functions = []
    for number, calls in enumerate(bodies):
        names = ["x", *(f"v{position}" for position in range(1, len(calls))), "y"]
        nodes = [call(name, *names[position : position + 2]) for position, name in enumerate(calls)]
        functions.append(helper.make_function("own", f"F{number}", ["x"], ["y"], nodes, OPSETS))
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8, 8]) for name in ("x", "y")]
    graph = helper.make_graph([call(f"F{len(bodies) - 1}", "x", "y")], "g", tensors[:1], tensors[1:])
    return helper.make_model(graph, functions=functions, opset_imports=OPSETS, ir_version=9)


def test_functions_are_inlined() -> None:
    inlined = inline_functions(model_of([["Relu", "Abs"], ["F0", "F0", "Neg"]]), FILE)
    assert not inlined.functions
    assert [node.op_type for node in inlined.graph.node] == ["Relu", "Abs", "Relu", "Abs", "Neg"]


def test_a_model_without_functions_is_not_changed() -> None:
    model = model_of([["Relu"]])
    del model.functions[:]
    assert inline_functions(model, FILE) is model


@pytest.mark.parametrize(
    ("bodies", "words"),
    [
        ([["Relu"] * 2, *[[f"F{number}"] * 2 for number in range(60)]], "expand to more than 100,000 nodes"),
        ([["F1"], ["F0"]], "call each other without end"),
        ([["Relu"], *[[f"F{number}"] for number in range(500)]], "call each other without end"),
        ([["NoSuchOperator"], ["F0", "F7"]], "is not a valid ONNX model"),
    ],
    ids=["2 to the 61 nodes", "a circle", "500 deep", "unknown operators"],
)
def test_functions_that_expand_without_end_are_refused(bodies: list[list[str]], words: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(model_of(bodies).SerializeToString())
    with pytest.raises(ModelFileError, match=words) as raised:
        adopt(path)
    assert str(path) in raised.value.problem
