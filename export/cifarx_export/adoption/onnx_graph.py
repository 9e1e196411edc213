"""Give the graph of an ONNX model the input, the output and the variable batch size that cifarx expects."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

INPUT: Final = "input"

_PREFIX: Final = "adopted/"

_ONNX_DOMAIN: Final = "ai.onnx"
"""The same as the empty domain."""

_SHAPE_OPERATORS: Final = frozenset({"Identity", "Cast", "Dropout", "Flatten", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that change neither the values of an image nor their order."""

_INTEGER_OPERATORS: Final = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)


class Interface(NamedTuple):
    """What connects a graph with its caller.

    Attributes:
        input_type: data type of the input.
        output: name of the output that returns the classes.
        new_output: the name that it gets.
        output_size: the number of values per image.
        batch_size: the only batch size that the graph takes, or None.
    """

    input_type: int
    output: str
    new_output: str
    output_size: int
    batch_size: int | None


def graph_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """Return the inputs of a graph that are not weights. Before IR version 4, weights were inputs too."""
    weights = {tensor.name for tensor in graph.initializer}
    return [info for info in graph.input if info.name not in weights]


def dimensions(info: ValueInfoProto) -> tuple[int | None, ...] | None:
    """Return the size of each axis of a tensor, None for an axis of variable size; or None for an unknown rank."""
    if not info.type.tensor_type.HasField("shape"):
        return None
    dims = info.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims)


def final_operator(graph: GraphProto, output: str) -> NodeProto | None:
    """Return the node that computes the values of an output, before nodes that only change its shape or type."""
    producers = {name: node for node in graph.node for name in node.output}
    node = producers.get(output)
    while node is not None and node.op_type in _SHAPE_OPERATORS:
        node = producers.get(node.input[0])
    return node


def uses_integers(graph: GraphProto) -> bool:
    """Return whether a part of the graph computes with quantized values."""
    return any(node.op_type in _INTEGER_OPERATORS for node in graph.node)


def uses_float16(graph: GraphProto) -> bool:
    """Return whether most weights are float16."""
    sizes = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 0}
    for tensor in graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += int(np.prod(tensor.dims, dtype=np.int64))
    return sizes[TensorProto.FLOAT16] > sizes[TensorProto.FLOAT]


def connect(model: ModelProto, interface: Interface) -> ModelProto:
    """Return the model with the input `input`, float32, and one output, float32 (batch, output size).

    Nodes are added instead of renaming values, which would have to reach into every subgraph.
    """
    _use_empty_domain(model)
    (image,) = graph_inputs(model.graph)
    output = next(info for info in model.graph.output if info.name == interface.output)
    adds_input = image.name != INPUT or interface.input_type != TensorProto.FLOAT
    adds_output = output.name != interface.new_output or not _is_float_matrix(output)
    added = ({INPUT} if adds_input else set()) | ({interface.new_output} if adds_output else set())
    prefix = _PREFIX if added & set(_value_names(model.graph)) else ""
    if prefix:
        model = onnx.compose.add_prefix(model, prefix)
        adds_input = adds_output = True
    graph = model.graph
    (image,) = graph_inputs(graph)
    if adds_input:
        for position, node in enumerate(_input_nodes(image.name, interface.input_type)):
            graph.node.insert(position, node)
    if adds_output:
        graph.node.extend(_output_nodes(prefix + interface.output, output, interface.new_output))
    if interface.input_type == TensorProto.UINT8:
        graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), _HALF))
    batch = interface.batch_size or "batch"
    shape = [batch, *(dim.dim_value or dim.dim_param or None for dim in image.type.tensor_type.shape.dim[1:])]
    new_input = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)
    new_output = helper.make_tensor_value_info(interface.new_output, TensorProto.FLOAT, [batch, interface.output_size])
    del graph.input[:], graph.output[:]
    graph.input.append(new_input)
    graph.output.append(new_output)
    _name_nodes(graph)
    return model


def _name_nodes(graph: GraphProto) -> None:
    """Give names to nodes without one, and to those that share one: quantization tells nodes apart by their names."""
    taken = Counter(node.name for node in graph.node)
    for number, node in enumerate(graph.node):
        if not node.name or taken[node.name] > 1:
            node.name = f"{_PREFIX}{node.op_type} {number}"


def _use_empty_domain(model: ModelProto) -> None:
    """Replace the other name of the domain of ONNX's own operators, which many tools do not know."""
    opsets = {"" if entry.domain == _ONNX_DOMAIN else entry.domain: entry.version for entry in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*item) for item in opsets.items())
    pending = [model.graph]
    while pending:
        for node in pending.pop().node:
            if node.domain == _ONNX_DOMAIN:
                node.domain = ""
            for attribute in node.attribute:
                pending += [attribute.g, *attribute.graphs]


def free_batch_size(model: ModelProto, batch_size: int) -> None:
    """Make the batch size of a model variable that states a fixed one, as far as that is possible.

    A Reshape whose constant shape starts with the batch size takes it from its input instead. Whether the result is the
    same model for other batch sizes, only a comparison shows.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for number, node in enumerate(graph.node):
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        if shape is None or node.input[0] in constants:  # weights have no batch
            continue
        sizes = numpy_helper.to_array(shape).copy()
        if not sizes.size or sizes[0] != batch_size or (0 in sizes and _allows_zero(node)):
            continue
        sizes[0] = 0 if -1 in sizes else -1  # 0 copies the size of the input's axis, and only one axis can be -1
        _forbid_zero(node)
        name = f"{_PREFIX}shape {number}"
        graph.initializer.append(numpy_helper.from_array(sizes, name))
        node.input[1] = name
    del graph.value_info[:]  # they state the fixed size


_HALF: Final = f"{_PREFIX}half"


def _input_nodes(name: str, data_type: int) -> list[NodeProto]:
    """Return nodes from `input` to the former input. Whole numbers are rounded, because float32 may be just below."""
    if data_type == TensorProto.UINT8:
        return [
            helper.make_node("Add", [INPUT, _HALF], [f"{_PREFIX}rounded"]),
            helper.make_node("Cast", [f"{_PREFIX}rounded"], [name], to=data_type),
        ]
    if data_type == TensorProto.FLOAT:
        return [helper.make_node("Identity", [INPUT], [name])]
    return [helper.make_node("Cast", [INPUT], [name], to=data_type)]


def _output_nodes(name: str, info: ValueInfoProto, new_name: str) -> list[NodeProto]:
    """Return nodes from the former output to the new one."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if info.type.tensor_type.elem_type != TensorProto.FLOAT:
        steps.append(("Cast", {"to": TensorProto.FLOAT}))
    if len(dimensions(info) or ()) != 2:
        steps.append(("Flatten", {"axis": 1}))
    steps = steps or [("Identity", {})]
    names = [name, *(f"{_PREFIX}output {number}" for number in range(1, len(steps))), new_name]
    return [
        helper.make_node(operator, [names[number]], [names[number + 1]], **attributes)
        for number, (operator, attributes) in enumerate(steps)
    ]


def _is_float_matrix(info: ValueInfoProto) -> bool:
    return info.type.tensor_type.elem_type == TensorProto.FLOAT and len(dimensions(info) or ()) == 2


def _allows_zero(node: NodeProto) -> bool:
    """Return whether 0 in a shape is the size of an axis instead of a copy of the input's size."""
    return any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)


def _forbid_zero(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "allowzero":
            attribute.i = 0


def _value_names(graph: GraphProto) -> Iterator[str]:
    """Yield the names of all values, also of those in subgraphs."""
    for info in [*graph.input, *graph.output]:
        yield info.name
    for tensor in graph.initializer:
        yield tensor.name
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            for subgraph in [attribute.g, *attribute.graphs]:
                yield from _value_names(subgraph)
