"""Check the graph of a LiteRT model before LiteRT sees it, which trusts a file and may crash on a damaged one.

The fields of the tables and the numbers of the operators and types are those of LiteRT's schema,
`tflite/converter/schema/schema.fbs`. What no export writes is refused: several graphs, operators that run other graphs
or keep a state, operators of other libraries, variables, sparse tensors, and weights outside the FlatBuffer.
"""

import math
from collections.abc import Collection, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.files.flatbuffer import FlatBufferError, Table, root_table

_IDENTIFIER: Final = slice(4, 8)
_TFLITE: Final = b"TFL3"
_VERSION: Final = 3

MAX_VALUES: Final = 1 << 28
"""The maximum number of values of a tensor for one image: 1 GiB of float32."""

_TYPES: Final = MappingProxyType({0: "float32", 2: "int32", 4: "int64", 6: "bool", 7: "int16", 9: "int8"})
"""The types of tensors, as NumPy names them."""

# Fields of the tables.
_MODEL_VERSION, _OPERATOR_CODES, _GRAPHS, _BUFFERS, _SIGNATURES = 0, 1, 2, 4, 7
_MODEL_FIELDS: Final = frozenset({_MODEL_VERSION, _OPERATOR_CODES, _GRAPHS, 3, _BUFFERS, 5, 6, _SIGNATURES})
_OLD_CODE, _CUSTOM_CODE, _CODE = 0, 1, 3
_TENSORS, _GRAPH_INPUTS, _GRAPH_OUTPUTS, _OPERATORS = 0, 1, 2, 3
_GRAPH_FIELDS: Final = frozenset({_TENSORS, _GRAPH_INPUTS, _GRAPH_OUTPUTS, _OPERATORS, 4, 5})
_SHAPE, _TYPE, _BUFFER, _QUANTIZATION, _SHAPE_SIGNATURE = 0, 1, 2, 4, 7
_TENSOR_FIELDS: Final = frozenset({_SHAPE, _TYPE, _BUFFER, 3, _QUANTIZATION, _SHAPE_SIGNATURE, 8})
_SCALE, _ZERO_POINT, _QUANTIZED_AXIS = 2, 3, 6
_QUANTIZATION_FIELDS: Final = frozenset({0, 1, _SCALE, _ZERO_POINT, _QUANTIZED_AXIS})
_OPERATOR_CODE, _INPUTS, _OUTPUTS, _OPTIONS_TYPE, _OPTIONS = 0, 1, 2, 3, 4
_OPERATOR_FIELDS: Final = frozenset({_OPERATOR_CODE, _INPUTS, _OUTPUTS, _OPTIONS_TYPE, _OPTIONS, 13})
_DATA: Final = 0
_SIGNATURE_INPUTS, _SIGNATURE_OUTPUTS = 0, 1
_NAME, _TENSOR_INDEX = 0, 1

_OPERATORS_OF_CODES: Final = MappingProxyType(
    {
        0: "ADD", 1: "AVERAGE_POOL_2D", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 5: "DEPTH_TO_SPACE",
        6: "DEQUANTIZE", 8: "FLOOR", 9: "FULLY_CONNECTED", 11: "L2_NORMALIZATION", 14: "LOGISTIC", 17: "MAX_POOL_2D",
        18: "MUL", 19: "RELU", 20: "RELU_N1_TO_1", 21: "RELU6", 22: "RESHAPE", 23: "RESIZE_BILINEAR", 25: "SOFTMAX",
        26: "SPACE_TO_DEPTH", 28: "TANH", 34: "PAD", 36: "GATHER", 39: "TRANSPOSE", 40: "MEAN", 41: "SUB", 42: "DIV",
        43: "SQUEEZE", 45: "STRIDED_SLICE", 47: "EXP", 49: "SPLIT", 50: "LOG_SOFTMAX", 53: "CAST", 54: "PRELU",
        55: "MAXIMUM", 57: "MINIMUM", 58: "LESS", 59: "NEG", 60: "PADV2", 61: "GREATER", 62: "GREATER_EQUAL",
        63: "LESS_EQUAL", 64: "SELECT", 65: "SLICE", 66: "SIN", 67: "TRANSPOSE_CONV", 69: "TILE", 70: "EXPAND_DIMS",
        71: "EQUAL", 72: "NOT_EQUAL", 73: "LOG", 74: "SUM", 75: "SQRT", 76: "RSQRT", 78: "POW", 81: "REDUCE_PROD",
        82: "REDUCE_MAX", 83: "PACK", 84: "LOGICAL_OR", 86: "LOGICAL_AND", 87: "LOGICAL_NOT", 88: "UNPACK",
        89: "REDUCE_MIN", 90: "FLOOR_DIV", 92: "SQUARE", 95: "FLOOR_MOD", 97: "RESIZE_NEAREST_NEIGHBOR",
        98: "LEAKY_RELU", 99: "SQUARED_DIFFERENCE", 100: "MIRROR_PAD", 101: "ABS", 102: "SPLIT_V", 104: "CEIL",
        105: "REVERSE_V2", 107: "GATHER_ND", 108: "COS", 111: "ELU", 114: "QUANTIZE", 116: "ROUND", 117: "HARD_SWISH",
        123: "SELECT_V2", 126: "BATCH_MATMUL", 128: "CUMSUM", 130: "BROADCAST_TO", 150: "GELU", 158: "SIGN",
    }
)  # fmt: skip
"""Operators that compute tensors from tensors, whose sizes do not depend on the values of other tensors' elements."""

_VECTOR_OPTIONS: Final = MappingProxyType({17: (0,), 30: (0,)})
"""The options that are vectors of integers, by the type of the options: RESHAPE and SQUEEZE. Others are numbers."""

_FULLY_CONNECTED, _QUANTIZATION_SPEC = 8, 5
"""The type of the options of a fully connected layer, and its only field that is a table."""

_NO_TENSOR: Final = -1
"""The index of an optional input that is left out, such as the bias of a layer."""


class GraphTensor(NamedTuple):
    """The input or the output of a graph.

    Attributes:
        name: its name in the signature.
        dtype: the name of the NumPy dtype.
        shape: the size of each axis.
        position: where it is among the tensors of the graph.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    position: int


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    is_constant: bool


class UnsafeGraphError(Exception):
    """Raised for a graph that no export writes. The message says what is wrong with it."""


def check_graph(content: bytes) -> tuple[GraphTensor, GraphTensor]:
    """Check a model, and return its only input and its only output.

    Args:
        content: the FlatBuffer.

    Raises:
        UnsafeGraphError: it is damaged, or it could do more than compute tensors of a bounded size.
    """
    if content[_IDENTIFIER] != _TFLITE:
        raise UnsafeGraphError("it does not start as a LiteRT model")
    try:
        return _check_model(root_table(content))
    except FlatBufferError as error:
        raise UnsafeGraphError(str(error)) from error


def operator_names(content: bytes) -> list[str]:
    """Return the names of the operators of a model that `check_graph` has accepted, without duplicates, sorted."""
    model = root_table(content)
    return sorted({_OPERATORS_OF_CODES[_builtin_code(code)] for code in model.tables(_OPERATOR_CODES)})


def _check_model(model: Table) -> tuple[GraphTensor, GraphTensor]:
    _require_fields(model, _MODEL_FIELDS, "the model")
    if (version := model.number(_MODEL_VERSION, "I")) != _VERSION:
        raise UnsafeGraphError(f"it has version {version}")
    buffers = [_buffer(buffer) for buffer in model.tables(_BUFFERS)]
    codes = model.tables(_OPERATOR_CODES)
    for code in codes:
        _check_operator_code(code)
    graphs = model.tables(_GRAPHS)
    if len(graphs) != 1:
        raise UnsafeGraphError(f"it has {len(graphs)} graphs")
    graph = graphs[0]
    _require_fields(graph, _GRAPH_FIELDS, "the graph")
    tensors = [_check_tensor(tensor, index, buffers) for index, tensor in enumerate(graph.tables(_TENSORS))]
    inputs, outputs = graph.numbers(_GRAPH_INPUTS, "i4").tolist(), graph.numbers(_GRAPH_OUTPUTS, "i4").tolist()
    for name, indices in (("inputs", inputs), ("outputs", outputs)):
        if len(indices) != 1 or not 0 <= indices[0] < len(tensors):
            raise UnsafeGraphError(f"its {name} are the tensors {indices[:4]} of {len(tensors)}")
    _check_order(graph.tables(_OPERATORS), len(codes), tensors, inputs[0], outputs[0])
    return _signature(model, tensors, inputs[0], outputs[0])


def _require_fields(table: Table, allowed: Collection[int], name: str) -> None:
    for field in table.fields:
        if field not in allowed:
            raise UnsafeGraphError(f"{name} has a field {field}, which no export writes")


def _buffer(buffer: Table) -> NDArray[np.uint8]:
    _require_fields(buffer, {_DATA}, "a buffer")
    return buffer.numbers(_DATA, "u1")


def _builtin_code(code: Table) -> int:
    return max(int(code.number(_OLD_CODE, "b")), int(code.number(_CODE, "i")))


def _check_operator_code(code: Table) -> None:
    number = _builtin_code(code)
    if number not in _OPERATORS_OF_CODES or code.text(_CUSTOM_CODE):
        custom = code.text(_CUSTOM_CODE)[:40].decode("ascii", "replace")
        raise UnsafeGraphError(f"it has the operator {custom or number}, which no export writes")


def _check_tensor(tensor: Table, index: int, buffers: Sequence[NDArray[np.uint8]]) -> _Tensor:
    name = f"tensor {index}"
    _require_fields(tensor, _TENSOR_FIELDS, name)
    kind, buffer = tensor.number(_TYPE, "b"), tensor.number(_BUFFER, "I")
    if kind not in _TYPES or buffer >= len(buffers):
        raise UnsafeGraphError(f"{name} has type {kind} and buffer {buffer}")
    shape = tuple(tensor.numbers(_SHAPE, "i4").tolist())
    if tensor.numbers(_SHAPE_SIGNATURE, "i4").size:
        raise UnsafeGraphError(f"{name} has a variable size")
    values = math.prod(shape)
    if min(shape, default=1) < 1 or values > MAX_VALUES:
        raise UnsafeGraphError(f"{name} has the shape {shape}, {values:,} values")
    size = buffers[buffer].size
    if size and size != values * np.dtype(_TYPES[kind]).itemsize:
        raise UnsafeGraphError(f"{name} has {size} bytes for {values} values of {_TYPES[kind]}")
    if (quantization := tensor.table(_QUANTIZATION)) is not None:
        _check_quantization(quantization, shape, name)
    return _Tensor(shape, _TYPES[kind], bool(size))


def _check_quantization(quantization: Table, shape: Sequence[int], name: str) -> None:
    """Check the scales: LiteRT crashes on some that are no numbers."""
    _require_fields(quantization, _QUANTIZATION_FIELDS, f"the quantization of {name}")
    for field in (0, 1):
        quantization.numbers(field, "f4")
    scales, zero_points = quantization.numbers(_SCALE, "f4"), quantization.numbers(_ZERO_POINT, "i8")
    axis = quantization.number(_QUANTIZED_AXIS, "i")
    per_channel = 0 <= axis < len(shape) and len(scales) == shape[axis]
    if len(scales) != len(zero_points) or not (len(scales) <= 1 or per_channel):
        raise UnsafeGraphError(f"{name} has {len(scales)} scales and {len(zero_points)} zero points")
    if not (np.isfinite(scales) & (scales > 0)).all() or not (np.abs(zero_points) <= 1 << 15).all():
        raise UnsafeGraphError(f"{name} has a scale that is not a positive number, or a zero point out of range")


def _check_order(operators: Sequence[Table], codes: int, tensors: Sequence[_Tensor], first: int, last: int) -> None:
    """Check that every operator reads tensors that exist by then and writes others, once."""
    known = {index for index, tensor in enumerate(tensors) if tensor.is_constant}
    if first in known:
        raise UnsafeGraphError("its input is a constant")
    known |= {first, _NO_TENSOR}
    for index, operator in enumerate(operators):
        name = f"operator {index}"
        _require_fields(operator, _OPERATOR_FIELDS, name)
        if operator.number(_OPERATOR_CODE, "I") >= codes:
            raise UnsafeGraphError(f"{name} has no code")
        _check_options(operator)
        inputs, outputs = operator.numbers(_INPUTS, "i4").tolist(), operator.numbers(_OUTPUTS, "i4").tolist()
        if unknown := [number for number in inputs if number not in known]:
            raise UnsafeGraphError(f"{name} reads the tensor {unknown[0]}, which nothing has written")
        for number in outputs:
            if number in known or not 0 <= number < len(tensors):
                raise UnsafeGraphError(f"{name} writes the tensor {number}")
            known.add(number)
    if last not in known:
        raise UnsafeGraphError("nothing writes its output")


def _check_options(operator: Table) -> None:
    options, kind = operator.table(_OPTIONS), operator.number(_OPTIONS_TYPE, "B")
    if options is None:
        return
    if kind == _FULLY_CONNECTED and _QUANTIZATION_SPEC in options.fields:
        raise UnsafeGraphError("a layer has a quantization of its own, which no export writes")
    for field in _VECTOR_OPTIONS.get(kind, ()):
        options.numbers(field, "i4")


def _signature(model: Table, tensors: Sequence[_Tensor], first: int, last: int) -> tuple[GraphTensor, GraphTensor]:
    """Return the input and the output with the names of the only signature."""
    signatures = model.tables(_SIGNATURES)
    if len(signatures) != 1:
        raise UnsafeGraphError(f"it has {len(signatures)} signatures")
    described = []
    for field, tensor in ((_SIGNATURE_INPUTS, first), (_SIGNATURE_OUTPUTS, last)):
        entries = signatures[0].tables(field)
        if [entry.number(_TENSOR_INDEX, "I") for entry in entries] != [tensor]:
            raise UnsafeGraphError("its signature has other tensors than its graph")
        if tensors[tensor].shape[:1] != (1,):
            raise UnsafeGraphError(f"its tensor of shape {tensors[tensor].shape} is not for one image")
        name = entries[0].text(_NAME).decode("utf-8", "replace")
        described.append(GraphTensor(name, tensors[tensor].dtype, tensors[tensor].shape, tensor))
    return described[0], described[1]
