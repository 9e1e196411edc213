from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarx_serve.backends.litert.graph import GraphTensor, UnsafeGraphError, check_graph, operator_names
from tests.support.litert_model import CUSTOM, IF, INT8, INT32, MEAN, Fields, TensorFields, flatbuffer

MODEL = flatbuffer(Fields())

Change = Callable[[Fields], object]


def tensor(index: int, *shape: int, **fields: object) -> Change:
    return lambda model: model.tensors.__setitem__(index, TensorFields(shape, **fields))  # type: ignore[arg-type]


def attribute(name: str, value: object) -> Change:
    return lambda model: setattr(model, name, value)


def test_a_good_graph() -> None:
    assert check_graph(MODEL) == (
        GraphTensor("input", "float32", (1, 4, 6, 3), 0),
        GraphTensor("logits", "float32", (1, 3), 4),
    )
    assert operator_names(MODEL) == ["MEAN", "MUL"]


GOOD: dict[str, Change] = {
    "one scale": tensor(2, 1, 3, scales=(0.5,), zero_points=(0,)),
    "a scale for each channel": tensor(2, 3, 1, scales=(0.5, 0.25, 1), zero_points=(0, 0, 0)),
    "no bias": attribute("operators", [(0, [0, 1], [2]), (1, [2, 3, -1], [4])]),
}

BAD: dict[str, tuple[Change, str]] = {
    "version": (attribute("version", 2), "version 2"),
    "control flow": (attribute("codes", [MEAN, IF]), "the operator 118, which no export writes"),
    "operator of a library": (attribute("codes", [MEAN, CUSTOM]), "the operator 32, which no export writes"),
    "unknown operator": (attribute("codes", [MEAN, 5000]), "the operator 5000"),
    "two graphs": (attribute("graphs", 2), "2 graphs"),
    "no graph": (attribute("graphs", 0), "0 graphs"),
    "two inputs": (attribute("inputs", [0, 3]), "its inputs are the tensors"),
    "input of no tensor": (attribute("inputs", [9]), r"its inputs are the tensors \[9\] of 5"),
    "negative output": (attribute("outputs", [-1]), r"its outputs are the tensors \[-1\]"),
    "constant input": (attribute("inputs", [3]), "its input is a constant"),
    "other tensors in the signature": (attribute("signature", (0, 2)), "its signature has other tensors"),
    "several images": (tensor(0, 2, 4, 6, 3), "is not for one image"),
    "no batch axis": (tensor(4), "is not for one image"),
    "huge tensor": (tensor(2, 1 << 20, 1 << 20), "1,099,511,627,776 values"),
    "empty tensor": (tensor(2, 1, 0), "the shape"),
    "negative size": (tensor(2, -3, -1), "the shape"),
    "strings": (tensor(2, 1, 3, kind=5), "type 5"),
    "buffer of nothing": (tensor(3, 1, buffer=9), "buffer 9"),
    "too few bytes": (tensor(3, 2, buffer=2), "4 bytes for 2 values of float32"),
    "too many bytes": (tensor(1, 1, kind=INT32, buffer=1), "8 bytes for 1 values of int32"),
    "variable": (tensor(2, 1, 3, extra={5: ("b", 1)}), "has a field 5, which no export writes"),
    "weights elsewhere": (tensor(3, 1, extra={10: ("I", 1)}), "has a field 10"),
    "scale that is no number": (tensor(2, 1, 3, scales=(float("nan"),), zero_points=(0,)), "not a positive number"),
    "scale of zero": (tensor(2, 1, 3, scales=(0,), zero_points=(0,)), "not a positive number"),
    "zero point": (tensor(2, 1, 3, scales=(1,), zero_points=(1 << 40,)), "zero point out of range"),
    "scales of other channels": (tensor(2, 1, 3, scales=(1, 1), zero_points=(0, 0)), "2 scales"),
    "missing zero points": (tensor(2, 1, 3, kind=INT8, scales=(1,)), "1 scales and 0 zero points"),
    "operator of no code": (attribute("operators", [(7, [0, 1], [4])]), "operator 0 has no code"),
    "tensor that nothing wrote": (attribute("operators", [(0, [2, 1], [4])]), "reads the tensor 2, which nothing"),
    "tensor outside the graph": (attribute("operators", [(0, [0, 77], [4])]), "reads the tensor 77"),
    "output outside the graph": (attribute("operators", [(0, [0, 1], [77])]), "writes the tensor 77"),
    "written twice": (attribute("operators", [(0, [0, 1], [4]), (1, [4, 3], [4])]), "operator 1 writes the tensor 4"),
    "written constant": (attribute("operators", [(0, [0, 1], [3])]), "writes the tensor 3"),
    "no operators": (attribute("operators", []), "nothing writes its output"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_an_export_writes_is_accepted(name: str) -> None:
    model = Fields()
    GOOD[name](model)
    check_graph(flatbuffer(model))


@pytest.mark.parametrize("name", BAD)
def test_what_no_export_writes_is_refused(name: str) -> None:
    change, problem = BAD[name]
    model = Fields()
    change(model)
    with pytest.raises(UnsafeGraphError, match=problem):
        check_graph(flatbuffer(model))


def test_another_file_is_refused() -> None:
    with pytest.raises(UnsafeGraphError, match="does not start as a LiteRT model"):
        check_graph(b"\x08\x07 an ONNX file")


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(8, len(MODEL)), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4))
def test_any_bytes_lead_to_a_graph_or_to_one_line(cut: int, changes: list[tuple[float, int]]) -> None:
    content = bytearray(MODEL[:cut])
    for position, value in changes:
        content[int(position * (cut - 1))] = value
    try:
        check_graph(bytes(content))
    except UnsafeGraphError as error:
        assert "\n" not in str(error)
