"""The model of `color_model` as a LiteRT file, written field by field, so that each field can be made hostile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flatbuffers
import msgspec
import numpy as np
import pytest

from cifarx_serve.files.trailing_document import append_document
from cifarx_serve.spec import InputSpec
from tests.support.color_model import SPEC

requires_litert = pytest.mark.skipif(
    find_spec("ai_edge_litert") is None, reason='no LiteRT: pip install "cifarx[litert]"'
)
requires_litert_torch = pytest.mark.skipif(
    find_spec("litert_torch") is None, reason="no litert-torch, which has an environment of its own: make test-litert"
)

MEAN, MUL, IF, CUSTOM = 40, 18, 118, 32
FLOAT32, INT32, INT8 = 0, 2, 9

_REDUCER_OPTIONS, _MUL_OPTIONS = 27, 21


@dataclass
class TensorFields:
    """A tensor. `extra` are other fields of its table, by their numbers: the code of the type and the value."""

    shape: Sequence[int]
    kind: int = FLOAT32
    buffer: int = 0
    scales: Sequence[float] = ()
    zero_points: Sequence[int] = ()
    extra: Mapping[int, tuple[str, int]] = field(default_factory=dict)


@dataclass
class Fields:
    """What a file holds. By default: the mean of the height and the width, and ten times that."""

    tensors: list[TensorFields] = field(
        default_factory=lambda: [
            TensorFields((1, 4, 6, 3)),
            TensorFields((2,), INT32, 1),
            TensorFields((1, 3)),
            TensorFields((1,), FLOAT32, 2),
            TensorFields((1, 3)),
        ]
    )
    buffers: list[bytes] = field(
        default_factory=lambda: [b"", np.array([1, 2], "<i4").tobytes(), np.array([10], "<f4").tobytes()]
    )
    codes: list[int] = field(default_factory=lambda: [MEAN, MUL])
    operators: list[tuple[int, list[int], list[int]]] = field(
        default_factory=lambda: [(0, [0, 1], [2]), (1, [2, 3], [4])]
    )
    inputs: list[int] = field(default_factory=lambda: [0])
    outputs: list[int] = field(default_factory=lambda: [4])
    signature: tuple[int, int] = (0, 4)
    graphs: int = 1
    version: int = 3


def spec_document() -> str:
    """Return the spec of the model, whose input is NHWC."""
    return msgspec.structs.replace(SPEC, input=InputSpec(height=4, width=6, layout="NHWC")).to_json()


def write_litert(path: Path, document: str | None = None, fields: Fields | None = None) -> Path:
    """Write the model as a LiteRT file.

    Args:
        path: the file.
        document: the spec to append; None for that of the model, "" for none.
        fields: the fields of the file.
    """
    path.write_bytes(flatbuffer(fields or Fields()))
    document = spec_document() if document is None else document
    if document:
        append_document(path, document.encode())
    return path


def flatbuffer(fields: Fields) -> bytes:
    """Return a model as a FlatBuffer."""
    builder = flatbuffers.Builder(1024)
    buffers = _tables(builder, [_buffer(builder, content) for content in fields.buffers])
    codes = _tables(
        builder, [_table(builder, 4, {0: ("b", min(code, 127)), 2: ("i", 1), 3: ("i", code)}) for code in fields.codes]
    )
    graphs = _tables(builder, [_graph(builder, fields) for _ in range(fields.graphs)])
    maps = [
        _tables(builder, [_tensor_map(builder, *pair)])
        for pair in zip(("input", "logits"), fields.signature, strict=True)
    ]
    key = builder.CreateString("serving_default")
    signature = _tables(builder, [_table(builder, 5, {0: ("o", maps[0]), 1: ("o", maps[1]), 2: ("o", key)})])
    model = {0: ("I", fields.version), 1: ("o", codes), 2: ("o", graphs), 4: ("o", buffers), 7: ("o", signature)}
    builder.Finish(_table(builder, 8, model), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _graph(builder: Any, fields: Fields) -> int:
    tensors = _tables(builder, [_tensor(builder, index, tensor) for index, tensor in enumerate(fields.tensors)])
    operators = _tables(builder, [_operator(builder, fields.codes, *operator) for operator in fields.operators])
    inputs, outputs = (_numbers(builder, indices, "<i4") for indices in (fields.inputs, fields.outputs))
    return _table(builder, 5, {0: ("o", tensors), 1: ("o", inputs), 2: ("o", outputs), 3: ("o", operators)})


def _tensor(builder: Any, index: int, tensor: TensorFields) -> int:
    name = builder.CreateString(f"tensor_{index}")
    content = {0: ("o", _numbers(builder, tensor.shape, "<i4")), 1: ("b", tensor.kind), 2: ("I", tensor.buffer)}
    if tensor.scales:
        scales, zero_points = _numbers(builder, tensor.scales, "<f4"), _numbers(builder, tensor.zero_points, "<i8")
        content[4] = ("o", _table(builder, 7, {2: ("o", scales), 3: ("o", zero_points)}))
    return _table(builder, 11, {**content, 3: ("o", name), **tensor.extra})


def _operator(builder: Any, codes: Sequence[int], code: int, inputs: list[int], outputs: list[int]) -> int:
    kind = _REDUCER_OPTIONS if code < len(codes) and codes[code] == MEAN else _MUL_OPTIONS
    options = _table(builder, 1, {})
    read, written = (_numbers(builder, indices, "<i4") for indices in (inputs, outputs))
    return _table(builder, 5, {0: ("I", code), 1: ("o", read), 2: ("o", written), 3: ("B", kind), 4: ("o", options)})


def _buffer(builder: Any, content: bytes) -> int:
    data = {0: ("o", builder.CreateByteVector(content))} if content else {}
    return _table(builder, 1, data)


def _tensor_map(builder: Any, name: str, index: int) -> int:
    return _table(builder, 2, {0: ("o", builder.CreateString(name)), 1: ("I", index)})


def _table(builder: Any, fields: int, content: Mapping[int, tuple[str, int]]) -> int:
    """Return a table, whose fields are an offset "o" or a number of a type as the module `struct` names it."""
    write = {
        "o": builder.PrependUOffsetTRelativeSlot,
        "b": builder.PrependInt8Slot,
        "B": builder.PrependUint8Slot,
        "i": builder.PrependInt32Slot,
        "I": builder.PrependUint32Slot,
        "Q": builder.PrependUint64Slot,
    }
    builder.StartObject(fields)
    for number, (code, value) in content.items():
        write[code](number, value, 0)
    return int(builder.EndObject())


def _tables(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _numbers(builder: Any, values: Sequence[float], dtype: str) -> int:
    return int(builder.CreateNumpyVector(np.array(values, dtype)))
