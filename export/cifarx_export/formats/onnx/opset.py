"""Conversion of an ONNX model to an older opset, for runtimes that read only older ones.

Most operators have the same meaning in every opset, with more types in newer ones. The converter of ONNX itself
(`onnx.version_converter`) refuses many of those, such as a Relu, so it is not used. This module looks at the signature
of each operator in the older opset (`onnx.defs`): attributes with their default value are left out, inputs that used to
be attributes become attributes, and the few operators with another meaning are expressed by others. Everything else is
refused.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, defs, helper, numpy_helper

from cifarx_serve.errors import UsageError

_SINGLE_AXIS_SOFTMAX: Final = 13
"""The opset from which Softmax normalizes along one axis instead of along all axes from one on."""


def convert_to_opset(model: ModelProto, opset: int) -> None:
    """Convert a model to an older opset, in place, and set the oldest IR version that the opset allows.

    Args:
        model: a model without functions, whose shapes are inferred.
        opset: the opset, 11 or newer.

    Raises:
        UsageError: an operator has no equivalent in that opset. The message names it.
    """
    version = next(entry for entry in model.opset_import if not entry.domain)
    graph = _Graph.of(model.graph, version.version, opset)
    refused: dict[str, int] = {}
    graph.convert(refused)
    if refused:
        raise _refused_error(*max(refused.items(), key=lambda item: item[1]))
    version.version = opset
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)


def unsupported_type_error(error: Exception, opset: int) -> UsageError | None:
    """Return the error for an operator that does not take a type in an older opset, or None for another reason.

    Args:
        error: what the checker of ONNX raised for the converted model.
        opset: the opset of the model.
    """
    operator = re.search(r"op_type:\s*(\w+)", str(error))
    newer = [schema.since_version for schema in _versions(operator[1])] if operator else []
    needed = min((version for version in newer if version > opset), default=None)
    return _refused_error(f"{operator[1]} of this type", needed) if operator and needed else None


def _refused_error(operator: str, needed: int) -> UsageError:
    return UsageError(f"{operator} needs opset {needed}", f"use --opset {needed} or newer")


class _Graph(NamedTuple):
    """The graph of a model while it is converted.

    Attributes:
        graph: the graph, which is modified.
        before, after: the opset of the model, and the one to convert to.
        constants: the constants by name, those of outer graphs included.
        shapes: the shapes of values by name; an axis of variable size is None.
    """

    graph: GraphProto
    before: int
    after: int
    constants: Mapping[str, NDArray[Any]]
    shapes: Mapping[str, Sequence[int | None]]

    @classmethod
    def of(cls, graph: GraphProto, before: int, after: int) -> "_Graph":
        return cls(graph, before, after, _constants(graph), _shapes(graph))

    def convert(self, refused: dict[str, int]) -> None:
        """Convert all nodes, and record refused operators with the opset that they need."""
        nodes = []
        for node in self.graph.node:
            for inner in (attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH):
                constants, shapes = {**self.constants, **_constants(inner)}, {**self.shapes, **_shapes(inner)}
                _Graph(inner, self.before, self.after, constants, shapes).convert(refused)
            try:
                nodes += self._convert_node(node)
            except _NeedsOpsetError as error:
                refused[error.operator] = max(error.opset, refused.get(error.operator, 0))
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _convert_node(self, node: NodeProto) -> list[NodeProto]:
        """Return the nodes that replace a node.

        Raises:
            _NeedsOpsetError: there are none.
        """
        if node.domain:
            return [node]
        converter = _CONVERTERS.get(node.op_type)
        converted = converter(self, node) if converter else [node]
        for new in converted:
            self._fit_signature(new)
        return converted

    def _fit_signature(self, node: NodeProto) -> None:
        """Leave out attributes with their default value, and check that the rest of a node fits the older operator."""
        operator = node.op_type
        try:
            schema = defs.get_schema(operator, self.after, "")
        except defs.SchemaError as error:
            raise _NeedsOpsetError(operator, _first_opset(_versions(operator))) from error
        newer = defs.get_schema(operator, self.before, "")
        for attribute in [entry for entry in node.attribute if entry.name not in schema.attributes]:
            name = attribute.name
            if helper.get_attribute_value(attribute) != _value(newer.attributes[name].default_value):
                with_attribute = [version for version in _versions(operator) if name in version.attributes]
                raise _NeedsOpsetError(f"{operator} with {name}", _first_opset(with_attribute))
            node.attribute.remove(attribute)
        while node.input and not node.input[-1]:
            node.input.pop()
        count = len(node.input)
        if count > schema.max_input:
            with_inputs = [version for version in _versions(operator) if version.max_input >= count]
            raise _NeedsOpsetError(f"{operator} with {count} inputs", _first_opset(with_inputs))

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer with a name that starts with `name`, and return its name."""
        taken = {tensor.name for tensor in self.graph.initializer}
        unique = next(text for text in (name, *(f"{name}_{n}" for n in range(len(taken) + 1))) if text not in taken)
        self.graph.initializer.append(numpy_helper.from_array(value, unique))
        return unique

    def constant_input(self, node: NodeProto, index: int) -> NDArray[Any] | None:
        """Return the value of an input, or None if the node has no such input.

        Raises:
            _NeedsOpsetError: the input is not a constant.
        """
        if len(node.input) <= index or not node.input[index]:
            return None
        if node.input[index] not in self.constants:
            needed = defs.get_schema(node.op_type, self.before, "").since_version
            raise _NeedsOpsetError(f"{node.op_type} with a computed input", needed)
        return self.constants[node.input[index]]


class _NeedsOpsetError(Exception):
    """An operator has no equivalent in the requested opset."""

    def __init__(self, operator: str, opset: int) -> None:
        self.operator = operator
        self.opset = opset
        super().__init__(operator)


def _input_to_attribute(name: str, index: int, since: int) -> "_Converter":
    """Return a converter of an operator that takes the input `index` as an attribute before opset `since`."""

    def convert(graph: _Graph, node: NodeProto) -> list[NodeProto]:
        if graph.after >= since:
            return [node]
        value = graph.constant_input(node, index)
        if value is not None:
            node.input[index] = ""
            node.attribute.append(helper.make_attribute(name, [int(entry) for entry in value.ravel()]))
        return [node]

    return convert


def _convert_split(graph: _Graph, node: NodeProto) -> list[NodeProto]:
    """State the sizes of unequal parts. Without sizes, older opsets split into equal parts."""
    count = _attribute(node, "num_outputs")
    if count is not None and graph.after < 18:
        size = _size(graph, node, _attribute(node, "axis") or 0)
        if size is None:
            raise _NeedsOpsetError("Split of a variable size", 18)
        _remove_attribute(node, "num_outputs")
        if size % count:
            part = math.ceil(size / count)
            sizes = [part] * (count - 1) + [size - part * (count - 1)]
            name = graph.add_constant(f"{node.output[0]}_sizes", np.array(sizes, np.int64))
            if graph.after < 13:
                node.attribute.append(helper.make_attribute("split", sizes))
            else:
                node.input.append(name)
    return _input_to_attribute("split", 1, 13)(graph, node)


def _convert_pad(graph: _Graph, node: NodeProto) -> list[NodeProto]:
    """State the padding of all axes, where the node states it only for some."""
    if graph.after >= 18 or len(node.input) < 4 or not node.input[3]:
        return [node]
    axes, pads, rank = graph.constant_input(node, 3), graph.constant_input(node, 1), _rank(graph, node)
    if axes is None or pads is None or rank is None:
        raise _NeedsOpsetError("Pad with axes", 18)
    complete = np.zeros((2, rank), np.int64)
    complete[:, axes] = pads.reshape(2, -1)
    node.input[1] = graph.add_constant(f"{node.output[0]}_pads", complete.ravel())
    node.input[3] = ""
    return [node]


def _convert_resize(graph: _Graph, node: NodeProto) -> list[NodeProto]:
    """Add the inputs that older opsets require, and state all axes."""
    if _attribute(node, "axes") is not None and graph.after < 18:
        raise _NeedsOpsetError("Resize with axes", 18)
    if graph.after < 13:
        inputs = [*node.input, "", ""]
        nothing = graph.add_constant(f"{node.output[0]}_none", np.array([], np.float32))
        node.input[:] = [inputs[0], inputs[1] or nothing, inputs[2] or nothing, *node.input[3:]]
    return [node]


def _convert_softmax(graph: _Graph, node: NodeProto) -> list[NodeProto]:
    """Move the axis to the end, where the old and the new operator have the same meaning."""
    if graph.after >= _SINGLE_AXIS_SOFTMAX:
        return [node]
    rank, axis = _rank(graph, node), _attribute(node, "axis")
    if rank is None:
        raise _NeedsOpsetError(node.op_type, _SINGLE_AXIS_SOFTMAX)
    position = (-1 if axis is None else axis) % rank
    _remove_attribute(node, "axis")
    node.attribute.append(helper.make_attribute("axis", rank - 1))
    if position == rank - 1:
        return [node]
    order = [index for index in range(rank) if index != position] + [position]
    moved, result, output = f"{node.output[0]}_moved", f"{node.output[0]}_last", node.output[0]
    before = helper.make_node("Transpose", [node.input[0]], [moved], f"{node.name}_to_last", perm=order)
    after = helper.make_node("Transpose", [result], [output], f"{node.name}_back", perm=np.argsort(order).tolist())
    node.input[0], node.output[0] = moved, result
    return [before, node, after]


def _convert_hard_swish(graph: _Graph, node: NodeProto) -> list[NodeProto]:
    """Multiply by a hard sigmoid, which is the definition of HardSwish."""
    if graph.after >= 14:
        return [node]
    gate = f"{node.output[0]}_gate"
    return [
        helper.make_node("HardSigmoid", [node.input[0]], [gate], f"{node.name}_gate", alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", [node.input[0], gate], [node.output[0]], node.name),
    ]


def _convert_shape(graph: _Graph, node: NodeProto) -> list[NodeProto]:
    """Take a part of the shape with a Slice."""
    start, end = _attribute(node, "start") or 0, _attribute(node, "end")
    if graph.after >= 15 or (start == 0 and end is None):
        return [node]
    for name in ("start", "end"):
        _remove_attribute(node, name)
    whole, output = f"{node.output[0]}_whole", node.output[0]
    first = graph.add_constant(f"{output}_start", np.array([start], np.int64))
    last = graph.add_constant(f"{output}_end", np.array([2**31 if end is None else end], np.int64))
    node.output[0] = whole
    return [node, helper.make_node("Slice", [whole, first, last], [output], f"{node.name}_part")]


def _convert_reshape(graph: _Graph, node: NodeProto) -> list[NodeProto]:
    """Leave out `allowzero`, which only matters for empty tensors if no size is a constant 0."""
    shape = graph.constants.get(node.input[1])
    if graph.after < 14 and (shape is None or (shape != 0).all()):
        _remove_attribute(node, "allowzero")
    return [node]


def _convert_constant(graph: _Graph, node: NodeProto) -> list[NodeProto]:
    """State numbers as a tensor."""
    if graph.after < 12 and _attribute(node, "value") is None and _attribute(node, "sparse_value") is None:
        attribute = node.attribute[0]
        value = np.array(helper.get_attribute_value(attribute))
        dtype = np.float32 if attribute.name.startswith("value_float") else np.int64
        node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(value.astype(dtype))))
    return [node]


_Converter = Callable[[_Graph, NodeProto], list[NodeProto]]

_REDUCTIONS: Final = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
)  # fmt: skip

_CONVERTERS: Final[Mapping[str, _Converter]] = {
    **{name: _input_to_attribute("axes", 1, 18) for name in _REDUCTIONS},
    "Constant": _convert_constant,
    "HardSwish": _convert_hard_swish,
    "LogSoftmax": _convert_softmax,
    "Pad": _convert_pad,
    "ReduceSum": _input_to_attribute("axes", 1, 13),
    "Reshape": _convert_reshape,
    "Resize": _convert_resize,
    "Shape": _convert_shape,
    "Softmax": _convert_softmax,
    "Split": _convert_split,
    "Squeeze": _input_to_attribute("axes", 1, 13),
    "Unsqueeze": _input_to_attribute("axes", 1, 13),
}


def _constants(graph: GraphProto) -> dict[str, NDArray[Any]]:
    """Return the constants of a graph that are small enough to be axes or sizes, by name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer if math.prod(tensor.dims) <= 64}
    for node in graph.node:
        if node.op_type == "Constant" and _attribute(node, "value") is not None:
            tensors[node.output[0]] = _attribute(node, "value")
    return {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}


def _shapes(graph: GraphProto) -> dict[str, list[int | None]]:
    """Return the known shapes of the values of a graph, by name."""
    shapes: dict[str, list[int | None]] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    return shapes


def _rank(graph: _Graph, node: NodeProto) -> int | None:
    shape = graph.shapes.get(node.input[0])
    return None if shape is None else len(shape)


def _size(graph: _Graph, node: NodeProto, axis: int) -> int | None:
    """Return the size of an axis of the first input, or None if it is not known."""
    shape = graph.shapes.get(node.input[0])
    return None if shape is None else shape[axis]


def _attribute(node: NodeProto, name: str) -> Any:
    """Return the value of an attribute, or None if the node does not state it."""
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def _remove_attribute(node: NodeProto, name: str) -> None:
    for attribute in [entry for entry in node.attribute if entry.name == name]:
        node.attribute.remove(attribute)


def _value(default: AttributeProto) -> Any:
    """Return the default value of an attribute, or None if it has none."""
    return None if default.type == AttributeProto.UNDEFINED else helper.get_attribute_value(default)


def _first_opset(versions: Iterable[Any]) -> int:
    """Return the first opset with one of these versions of an operator."""
    return min(int(version.since_version) for version in versions)


def _versions(operator: str) -> Iterator[Any]:
    """Yield the versions of an operator of ONNX."""
    for schema in defs.get_all_schemas_with_history():
        if schema.name == operator and schema.domain == "":
            yield schema
