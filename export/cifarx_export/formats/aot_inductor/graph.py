"""The graph of PyTorch operators that is quantized, in fp32."""

from operator import attrgetter, getitem
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cifarx_export.formats.exported_program import export_program
from cifarx_export.formats.int8.fx_layers import WITH_WEIGHTS, packet_name

RESHAPING: Final = frozenset({"view", "reshape", "flatten"})
"""Operators that leave integers as they are, by the names of their overload packets."""

_ATEN: Final = torch.ops.aten


def prepare_graph(module: nn.Module, example: Tensor) -> GraphModule:
    """Export a network to a graph without side effects, with batch normalization folded into convolutions."""
    program = export_program(module, example, "aotinductor").run_decompositions({})
    network: GraphModule = program.module(check_guards=False)
    for node in list(network.graph.nodes):
        if node.target is _ATEN.conv2d.padding:
            _state_padding(node)
        elif node.target is _ATEN._native_batch_norm_legit_no_training.default:
            _fold_batch_norm(network, node)
        elif node.target is _ATEN.view.default:
            node.target = _ATEN.reshape.default  # which copies what has another layout in memory than here
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _state_padding(node: Node) -> None:
    """State padding "same" or "valid" as numbers, where it is equal at both sides."""
    _, weight, _, stride, padding, dilation, _ = convolution_arguments(node)
    reach = [step * (size - 1) for step, size in zip(dilation, weight.meta["val"].shape[2:], strict=True)]
    if padding == "same" and (any(length % 2 for length in reach) or set(stride) != {1}):
        return
    node.target = _ATEN.conv2d.default
    node.update_arg(4, [length // 2 if padding == "same" else 0 for length in reach])


def convolution_arguments(node: Node) -> list[Any]:
    """Return all seven arguments of a convolution: input, weight, bias, stride, padding, dilation and groups."""
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    return [*node.args, *defaults[len(node.args) :]]


def _fold_batch_norm(network: GraphModule, node: Node) -> None:
    convolution = node.args[0]
    assert isinstance(convolution, Node)
    is_first_output = all(user.target is getitem and user.args[1] == 0 for user in node.users)
    if not (_has_known_weights(convolution) and len(convolution.users) == 1 and is_first_output):
        return
    weight, bias = (constant(network, argument) for argument in convolution_arguments(convolution)[1:3])
    scale, shift, mean, variance = (constant(network, argument) for argument in node.args[1:5])
    assert weight is not None
    folded = fuse_conv_bn_weights(weight, bias, mean, variance, node.args[6], scale, shift)  # type: ignore[arg-type]
    for position, (name, value) in enumerate(zip(("weight", "bias"), folded, strict=True), 1):
        target = f"folded_{convolution.name}_{name}"
        network.register_buffer(target, value.detach())
        with network.graph.inserting_before(convolution):
            attribute = network.graph.get_attr(target)
        attribute.meta["val"] = value.detach()
        arguments = convolution_arguments(convolution)
        arguments[position] = attribute
        convolution.args = tuple(arguments)
    for user in list(node.users):
        user.replace_all_uses_with(convolution)


def constant(network: GraphModule, node: Any) -> Tensor | None:
    """Return the weights that an argument stands for, or None if there are none."""
    if node is None:
        return None
    assert isinstance(node.target, str)
    value: Tensor = attrgetter(node.target)(network)
    return value.detach()


def _has_known_weights(node: Node) -> bool:
    """Return whether a node is a layer whose weights and bias are those of the network, and not computed from them."""
    arguments = node.args[1:3]
    known = all(
        argument is None or (isinstance(argument, Node) and argument.op == "get_attr") for argument in arguments
    )
    return node.target in WITH_WEIGHTS and known


def quantizable_layers(network: GraphModule) -> list[Node]:
    """Return the layers that can be quantized."""
    return [node for node in network.graph.nodes if _has_known_weights(node)]


def nodes_to_calibrate(network: GraphModule) -> list[Node]:
    """Return the nodes whose values `quantize_graph` may need the range of.

    These are the inputs of what it quantizes, and the results of additions, with the activation function.
    """
    found: dict[Node, None] = {}
    for node in network.graph.nodes:
        if node.target in WITH_WEIGHTS or packet_name(node) in {"max_pool2d", *RESHAPING}:
            found[node.args[0]] = None
        elif node.target is _ATEN.add.Tensor:
            nodes = (*node.args, node, *(reader for reader in node.users if reader.target is _ATEN.relu.default))
            found.update(dict.fromkeys(value for value in nodes if isinstance(value, Node)))
    return [node for node in found if is_float(node)]


def is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32 and node.op != "get_attr"
