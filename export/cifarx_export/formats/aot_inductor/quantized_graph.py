"""From a graph of PyTorch operators in fp32 to one of the int8 operators of oneDNN.

Activations are uint8 with one scale and zero point per tensor. A convolution takes in what follows it where oneDNN
computes both at once: the addition of a residual block, and an activation function. So a residual block reads and
writes int8 only. Other operators run in float32, between a conversion from int8 and one to it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from cifarx_export.formats.aot_inductor.graph import RESHAPING, constant, convolution_arguments, is_float
from cifarx_export.formats.aot_inductor.operators import (
    CONVOLUTION,
    CONVOLUTION_ADD,
    LINEAR,
    MAX_POOL,
    PACK_CONVOLUTION,
    PACK_LINEAR,
)
from cifarx_export.formats.int8.calibration import Ranges
from cifarx_export.formats.int8.fx_layers import packet_name

WITHOUT_WEIGHTS: Final = frozenset({"add", "max_pool2d"})
"""The operators without weights that are computed in int8, by the names of their overload packets."""

_ATEN: Final = torch.ops.aten
_CONVOLUTION: Final = _ATEN.conv2d.default
_QUANTIZE: Final = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE: Final = torch.ops.quantized_decomposed.dequantize_per_tensor.default

_ACTIVATION_FUNCTIONS: Final[Mapping[Any, str]] = {
    _ATEN.relu.default: "relu",
    _ATEN.hardtanh.default: "hardtanh",
    _ATEN.hardswish.default: "hardswish",
    _ATEN.silu.default: "swish",
}
"""Activation functions that oneDNN computes together with a convolution, and their names there."""

_MAX_LEVEL: Final = 255
_SMALLEST_SCALE: Final = 2.0**-20


class Quantization(NamedTuple):
    """How real values are stored as uint8: value = scale * (integer - zero_point)."""

    scale: float
    zero_point: int


class QuantizedWeight(NamedTuple):
    """Weights in int8: levels of the shape of the weights, and a scale for each output channel."""

    levels: Tensor
    scales: Tensor


class _Group(NamedTuple):
    """Nodes that are computed together.

    Attributes:
        layer: a convolution or a linear layer.
        addition: the addition of its result and `addend`, if there is one.
        addend: what is added.
        function: the activation function of the result, if there is one.
    """

    layer: Node
    addition: Node | None = None
    addend: Node | None = None
    function: Node | None = None

    @property
    def end(self) -> Node:
        """The node whose value is the result."""
        return self.function or self.addition or self.layer


def quantize_graph(
    network: GraphModule, weights: Mapping[str, QuantizedWeight], ranges: Ranges, fp32_nodes: Collection[str]
) -> GraphModule:
    """Return the network with int8 operators.

    Args:
        network: a network from `prepare_graph`.
        weights: the quantized weights of the layers, by the name of the node. A layer without them stays in fp32.
        ranges: the ranges of `nodes_to_calibrate`, by the name of the node.
        fp32_nodes: names of nodes that stay in fp32.
    """
    used = {name: weight for name, weight in weights.items() if name not in fp32_nodes}
    return _Quantizer(network, used, ranges, fp32_nodes).quantize()


def quantization_of(low: float, high: float) -> Quantization:
    """Return the quantization of values in a range. Zero is always represented exactly, because padding is zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / _MAX_LEVEL, _SMALLEST_SCALE)
    return Quantization(scale, min(_MAX_LEVEL, max(0, round(-low / scale))))


class _Placement:
    """Which nodes of a network are computed together, and which values are stored as integers.

    Args:
        network: the network.
        layers: names of the layers in int8.
        fp32_nodes: names of nodes that stay in fp32.
    """

    def __init__(self, network: GraphModule, layers: Collection[str], fp32_nodes: Collection[str]) -> None:
        self._fp32_nodes = fp32_nodes
        self._order = {node: position for position, node in enumerate(network.graph.nodes)}
        self.groups: dict[Node, _Group] = {}
        self._additions: set[Node] = set()
        for node in self._order:
            if node.name in layers:
                group = self._group_of(node)
                self.groups[node] = group
                if group.addition is not None:
                    self._additions.add(group.addition)
        followers = ((group.addition, group.function) for group in self.groups.values())
        self.followers: Final = {node for nodes in followers for node in nodes if node is not None}

    def _group_of(self, layer: Node) -> _Group:
        group = _Group(layer)
        if layer.target is not _CONVOLUTION:
            return group
        addition = _only_reader(layer)
        if addition is not None and (addend := self._addend(addition, layer)) is not None:
            group = group._replace(addition=addition, addend=addend)
        function = _only_reader(group.end)
        functions = _ACTIVATION_FUNCTIONS if group.addition is None else {_ATEN.relu.default}
        return group._replace(function=function) if function is not None and function.target in functions else group

    def _addend(self, addition: Node, layer: Node) -> Node | None:
        """Return what is added to a layer, if oneDNN can add it: a value of the same shape that is known before."""
        if addition.target is not _ATEN.add.Tensor or addition.kwargs or addition.name in self._fp32_nodes:
            return None
        others = [argument for argument in addition.args if isinstance(argument, Node) and argument is not layer]
        if len(others) != 1 or not is_float(others[0]):
            return None
        [other] = others
        same = str(other.meta["val"].shape) == str(layer.meta["val"].shape)
        return other if same and self._order[other] < self._order[layer] else None

    def is_read_as_integers(self, node: Node) -> bool:
        """Return whether any reader of a value takes integers."""
        return any(self._takes_integers(reader, node) for reader in node.users)

    def _takes_integers(self, reader: Node, node: Node) -> bool:
        if reader in self.groups:
            return reader.args[0] is node
        return reader in self._additions or self.keeps_integers(reader)

    def keeps_integers(self, node: Node) -> bool:
        """Return whether an operator without weights computes its integers from those of its input."""
        name = packet_name(node)
        is_one = name in RESHAPING or (name == "max_pool2d" and node.name not in self._fp32_nodes)
        return is_one and is_float(node) and self.is_read_as_integers(node)


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class _Quantizer:
    """Writes the new graph, node by node. Each value is there as float32, as integers, or as both, as it is read."""

    def __init__(
        self, network: GraphModule, weights: Mapping[str, QuantizedWeight], ranges: Ranges, fp32_nodes: Collection[str]
    ) -> None:
        self._network = network
        self._weights = weights
        self._ranges = ranges
        self._placement = _Placement(network, weights, fp32_nodes)
        self._graph = Graph()
        self._constants: dict[str, Tensor] = {}
        self._floats: dict[Node, Node] = {}
        self._integers: dict[Node, tuple[Node, Quantization]] = {}

    def quantize(self) -> GraphModule:
        for node in self._network.graph.nodes:
            if node.op == "output":
                [[output]] = node.args  # the exporter's graph states the structure of the results elsewhere
                self._graph.output(self._float(output))
            elif node in self._placement.groups:
                self._write_group(self._placement.groups[node])
            elif node not in self._placement.followers:
                self._write(node)
        self._graph.eliminate_dead_code()
        for node in self._graph.nodes:
            if node.op == "get_attr" and node.target not in self._constants:
                value = constant(self._network, node)
                assert value is not None
                self._constants[node.target] = value
        return GraphModule(self._constants, self._graph)

    def _write(self, node: Node) -> None:
        if not self._placement.keeps_integers(node):
            read = self._any if packet_name(node) == "sym_size" else self._float
            self._floats[node] = self._graph.node_copy(node, read)
            return
        integers, quantization = self._integer(node.args[0])
        if packet_name(node) == "max_pool2d":
            written = self._graph.call_function(MAX_POOL, (integers, *_pool_arguments(node)))
        else:
            rest = torch.fx.map_arg(node.args[1:], self._any)
            written = self._graph.call_function(node.target, (integers, *rest), node.kwargs)  # type: ignore[arg-type]
        self._integers[node] = written, quantization

    def _write_group(self, group: _Group) -> None:
        layer, end = group.layer, group.end
        result = None
        if group.addition is not None or self._placement.is_read_as_integers(end):
            result = self._quantization(end)
        arguments = self._layer_arguments(group, result)
        if layer.target is not _CONVOLUTION:
            written = self._graph.call_function(LINEAR, (*arguments, "none", [], ""))
        elif group.addend is None:
            written = self._graph.call_function(CONVOLUTION, (*arguments, *_function_arguments(group.function)))
        else:
            addend, quantization = self._integer(group.addend)
            # ReLU is the only activation function that follows an addition.
            post: tuple[Any, ...] = (*quantization, "sum", 1.0, "none" if group.function is None else "relu", [], "")
            written = self._graph.call_function(CONVOLUTION_ADD, (*arguments[:6], addend, *arguments[6:], *post))
        if result is None:
            self._floats[end] = written
        else:
            self._integers[end] = written, result

    def _layer_arguments(self, group: _Group, result: Quantization | None) -> tuple[Any, ...]:
        """Return the arguments of an operator up to the data type of its result, which is float32 if there is none."""
        layer = group.layer
        integers, (scale, zero_point) = self._integer(layer.args[0])
        weight = self._weights[layer.name]
        levels = self._attribute(f"{layer.name}_levels", weight.levels)
        scales = self._attribute(f"{layer.name}_scales", weight.scales)
        zero_points = self._attribute(f"{layer.name}_zero_points", torch.zeros(len(weight.scales), dtype=torch.int32))
        output = (*(result or (1.0, 0)), torch.float32 if result is None else torch.uint8)
        if layer.target is not _CONVOLUTION:
            bias = layer.args[2] if len(layer.args) > 2 else None
            packed = self._graph.call_function(PACK_LINEAR, (levels, None))
            return (integers, scale, zero_point, packed, scales, zero_points, self._optional(bias), *output)
        _, _, bias, *geometry = convolution_arguments(layer)
        packed = self._graph.call_function(PACK_CONVOLUTION, (levels, scales, scale, zero_point, *geometry))
        return (integers, scale, zero_point, packed, scales, zero_points, self._optional(bias), *geometry, *output)

    def _integer(self, node: Any) -> tuple[Node, Quantization]:
        """Return a value as integers, and their quantization."""
        if node not in self._integers:
            quantization, value = self._quantization(node), self._floats[node]
            if node.meta["val"].ndim == 4:  # the layout of oneDNN
                value = self._graph.call_function(
                    _ATEN.contiguous.default, (value,), {"memory_format": torch.channels_last}
                )
            written = self._graph.call_function(_QUANTIZE, (value, *quantization, 0, _MAX_LEVEL, torch.uint8))
            self._integers[node] = written, quantization
        return self._integers[node]

    def _float(self, node: Node) -> Node:
        """Return a value as float32, or as it is if it was never an activation."""
        if node not in self._floats:
            integers, quantization = self._integers[node]
            arguments = (integers, *quantization, 0, _MAX_LEVEL, torch.uint8)
            self._floats[node] = self._graph.call_function(_DEQUANTIZE, arguments)
        return self._floats[node]

    def _any(self, node: Node) -> Node:
        """Return a value in whatever form there is, for its shape."""
        return self._integers[node][0] if node in self._integers else self._floats[node]

    def _quantization(self, node: Node) -> Quantization:
        low, high = self._ranges[node.name]
        return quantization_of(float(low), float(high))

    def _attribute(self, name: str, value: Tensor) -> Node:
        self._constants[name] = value
        return self._graph.get_attr(name)

    def _optional(self, node: Any) -> Node | None:
        return None if node is None else self._float(node)


def _function_arguments(function: Node | None) -> tuple[str, Sequence[float], str]:
    """Return the name, the parameters and the algorithm of an activation function as oneDNN takes them."""
    if function is None:
        return "none", [], ""
    name = _ACTIVATION_FUNCTIONS[function.target]
    bounds = [float(value) for value in (*function.args[1:], *(-1.0, 1.0)[len(function.args) - 1 :])]  # type: ignore[arg-type]
    return name, bounds if name == "hardtanh" else [], ""


def _pool_arguments(node: Node) -> Iterator[Any]:
    """Yield the kernel, stride, padding, dilation and ceil mode of a pooling operator."""
    kernel = node.args[1]
    given = (*node.args[1:], *(kernel, [0, 0], [1, 1], False)[len(node.args) - 2 :])
    for value in given[:4]:
        sizes: list[int] = list(value or kernel)  # type: ignore[arg-type]
        yield sizes * 2 if len(sizes) == 1 else sizes
    yield given[4]
