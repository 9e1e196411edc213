"""A network of PyTorch that computes what an ONNX model computes."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, helper, numpy_helper
from torch import Tensor, nn

from cifarx_export.formats.onnx.constant_folding import fold_constants
from cifarx_export.formats.registry import example_input
from cifarx_export.onnx_network.elementwise import ELEMENTWISE
from cifarx_export.onnx_network.layers import LAYERS
from cifarx_export.onnx_network.node import Node, Operator
from cifarx_export.onnx_network.reductions import REDUCTIONS
from cifarx_export.onnx_network.shaping import SHAPING
from cifarx_export.onnx_network.values import Value, as_sizes
from cifarx_serve.errors import UsageError, error_message
from cifarx_serve.spec import ModelSpec

_DOMAINS: Final = ("", "ai.onnx")
"""The names of the domain of ONNX's own operators."""


def _apply_linear(_node: Node, data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(data, weight, bias)


_NUMBERS: Final[Mapping[str, Mapping[int, str]]] = MappingProxyType(
    {"Clip": {1: "min", 2: "max"}, "Pad": {2: "value"}, "Resize": {2: "scales"}}
)
"""The inputs of operators that are numbers, by their positions, and the names of the attributes for them."""

_LINEAR: Final = "Linear"
"""A product with constant weights, which PyTorch's formats know as a layer."""

OPERATORS: Final[Mapping[str, Operator]] = MappingProxyType(
    {
        **ELEMENTWISE,
        **LAYERS,
        **REDUCTIONS,
        **SHAPING,
        _LINEAR: _apply_linear,
    }
)
"""The operators of ONNX that a network can have, by their names."""


class _Graph(NamedTuple):
    nodes: list[Node]
    constants: dict[str, NDArray[Any]]
    input: str
    output: str


def build_network(model: ModelProto, name: str, spec: ModelSpec) -> "OnnxNetwork":
    """Return a network of PyTorch that computes what an ONNX model computes, in eval mode.

    Args:
        model: the model, with one input and one output.
        name: its name, for messages.
        spec: its spec.

    Raises:
        UsageError: the model uses operators that are not supported.
    """
    try:
        network = OnnxNetwork(model, spec.input.shape).eval()
        with torch.no_grad():
            network(example_input(spec))
    except NotImplementedError as error:
        raise UsageError(
            f"{name} uses {error_message(error)}, which cifarx cannot turn into operators of PyTorch",
            "use a --format that is made from ONNX, such as openvino",
        ) from error
    return network


class OnnxNetwork(nn.Module):
    """Computes what an ONNX model with one input and one output computes, for any batch size.

    Batch normalization is folded into convolutions. The weights are parameters.

    Args:
        model: the model. It is not changed.
        shape: the shape of an image, which the model may leave open.

    Raises:
        NotImplementedError: it uses operators that are not in `OPERATORS`. Running it also raises this for attributes
            that are not supported, and for shapes that depend on the values of the images.
    """

    def __init__(self, model: ModelProto, shape: Sequence[int]) -> None:
        super().__init__()
        graph = _read(fold_constants(_with_image_shape(model, shape)))
        self._nodes, self._input, self._output = graph.nodes, graph.input, graph.output
        self._sizes = {key: as_sizes(value) for key, value in graph.constants.items() if not _is_float(value)}
        self._weights: dict[str, str] = {}
        floats = {key: value for key, value in graph.constants.items() if _is_float(value)}
        for position, (key, value) in enumerate(floats.items()):
            self._weights[key] = f"{re.sub(r'[^a-zA-Z0-9]+', '_', key).strip('_')}_{position}"
            weight = nn.Parameter(torch.from_numpy(value.copy()), requires_grad=False)
            self.register_parameter(self._weights[key], weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return the output of the model.

        Args:
            images: float32, as the model takes them.
        """
        values: dict[str, Value | None] = {"": None, self._input: images, **self._sizes}
        values |= {key: self.get_parameter(name) for key, name in self._weights.items()}
        for node in self._nodes:
            found = OPERATORS[node.operator](node, *(values[key] for key in node.inputs))
            outputs = found if isinstance(found, Sequence) else [found]
            values |= dict(zip(node.outputs, outputs, strict=False))  # optional ones are never computed
        output = values[self._output]
        assert isinstance(output, Tensor)
        return output


def _with_image_shape(model: ModelProto, shape: Sequence[int]) -> ModelProto:
    """Return a copy of the model that states the shape of an image, so that other shapes can be inferred."""
    copied = ModelProto()
    copied.CopyFrom(model)
    (image,) = _inputs(copied.graph)
    for axis, length in zip(image.type.tensor_type.shape.dim[1:], shape, strict=True):
        axis.dim_value = length
    return copied


def _inputs(graph: GraphProto) -> list[Any]:
    weights = {tensor.name for tensor in graph.initializer}
    return [info for info in graph.input if info.name not in weights]


def _read(model: ModelProto) -> _Graph:
    graph = model.graph
    used = {node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}" for node in graph.node}
    if unknown := sorted(used - OPERATORS.keys() - {"Constant"}):
        raise NotImplementedError(", ".join(unknown))
    opset = next(entry.version for entry in model.opset_import if entry.domain in _DOMAINS)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for proto in graph.node:
        attributes = {attribute.name: _attribute(attribute) for attribute in proto.attribute}
        if proto.op_type == "Constant":
            (value,) = attributes.values()
            constants[proto.output[0]] = np.asarray(value)
            continue
        node = Node(proto.op_type, tuple(proto.input), tuple(proto.output), attributes, opset)
        nodes.append(_as_linear(node, constants) or _with_numbers(node, constants))
    used = {name for node in nodes for name in node.inputs}
    (image,) = _inputs(graph)
    return _Graph(
        nodes,
        {name: value for name, value in constants.items() if name in used},
        image.name,
        graph.output[0].name,
    )


def _attribute(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if attribute.type == AttributeProto.TENSOR else value


def _with_numbers(node: Node, constants: Mapping[str, NDArray[Any]]) -> Node:
    """Return a node with constant inputs as attributes, which PyTorch takes as numbers instead of tensors."""
    inputs, numbers = list(node.inputs), {}
    for position, name in _NUMBERS.get(node.operator, {}).items():
        value = constants.get(inputs[position]) if position < len(inputs) else None
        if value is not None and value.size:
            inputs[position], numbers[name] = "", value.tolist()
    return node._replace(inputs=inputs, attributes={**node.attributes, **numbers})


def _as_linear(node: Node, constants: dict[str, NDArray[Any]]) -> Node | None:
    """Return a product with constant weights as a linear layer, whose weights are (outputs, inputs)."""
    if node.operator not in ("MatMul", "Gemm") or node.get("transA", 0):
        return None
    if node.get("alpha", 1.0) != 1 or node.get("beta", 1.0) != 1:
        return None
    weight = constants.get(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    inputs = [node.inputs[0], node.inputs[1]]
    if not node.get("transB", 0):
        inputs[1] = f"{node.inputs[1]} transposed"
        constants[inputs[1]] = np.ascontiguousarray(weight.T)
    outputs = len(constants[inputs[1]])
    for name in node.inputs[2:]:
        bias = constants.get(name)
        if bias is None or bias.size != outputs:
            return None
        inputs.append(f"{name} of a layer")
        constants[inputs[2]] = bias.reshape(-1)
    return Node(_LINEAR, inputs, node.outputs, {}, node.opset)


def _is_float(value: NDArray[Any]) -> bool:
    return bool(np.issubdtype(value.dtype, np.floating))
