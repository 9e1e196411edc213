import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarx_serve.files.flatbuffer import FlatBufferError, Table, root_table
from tests.support.litert_model import Fields, flatbuffer

MODEL = flatbuffer(Fields())


def read_everything(table: Table, depth: int = 0) -> None:
    """Follow every field as a table, a vector of tables, a string and a vector of numbers."""
    for field in table.fields:
        for read in (table.table, table.tables, table.text, lambda field: table.numbers(field, "f4")):
            try:
                found = read(field)
            except FlatBufferError:
                continue
            if depth < 3:
                for child in found if isinstance(found, list) else [found]:
                    if isinstance(child, Table):
                        read_everything(child, depth + 1)


def test_fields() -> None:
    model = root_table(MODEL)
    assert model.fields == [0, 1, 2, 4, 7]
    assert model.number(0, "I") == 3
    [graph] = model.tables(2)
    tensors = graph.tables(0)
    assert [tensor.text(3) for tensor in tensors] == [f"tensor_{index}".encode() for index in range(5)]
    assert tensors[0].numbers(0, "i4").tolist() == [1, 4, 6, 3]
    np.testing.assert_array_equal(graph.numbers(1, "i4"), [0])


def test_fields_that_a_table_does_not_have() -> None:
    model = root_table(MODEL)
    for field in (3, 100):
        assert model.number(field, "i", 7) == 7
        assert model.table(field) is None
        assert model.tables(field) == []
        assert model.text(field) == b""
        assert model.numbers(field, "i8").size == 0


@pytest.mark.parametrize("content", [b"", b"\0\0\0", struct.pack("<I", 100), struct.pack("<Ii", 4, 100), b"\xff" * 64])
def test_a_root_outside_the_buffer_is_an_error(content: bytes) -> None:
    with pytest.raises(FlatBufferError, match=r"is outside the file|is damaged|is outside the table"):
        root_table(content)


def test_a_vector_that_is_longer_than_the_buffer_is_an_error() -> None:
    content = bytearray(MODEL)
    at = MODEL.index(b"serving_default") - 4
    content[at : at + 4] = struct.pack("<I", 1 << 31)
    [signature] = root_table(bytes(content)).tables(7)
    with pytest.raises(FlatBufferError, match="extends beyond the end"):
        signature.text(2)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_bytes_never_lead_out_of_the_buffer(data: st.DataObject) -> None:
    content = bytearray(MODEL[: data.draw(st.integers(0, len(MODEL)))])
    for _ in range(data.draw(st.integers(0, 8)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_everything(root_table(bytes(content)))
    except FlatBufferError as error:
        assert "\n" not in str(error)
