"""The layers of a graph of PyTorch operators, as `MixedPrecisionSearch` takes them."""

import math
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import SymInt, nn
from torch.fx import GraphModule, Node

from cifarx_export.formats.int8.search import Layer

WITH_WEIGHTS: Final = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
"""The operators with weights that are quantized."""

_BATCH_SIZE: Final = 64

_MIN_COST: Final = 0.02
"""The lowest cost of leaving a layer in fp32."""


def find_layers(graph: GraphModule, without_weights: Collection[str]) -> list[Layer]:
    """Return the layers with weights in graph order, then the other operators that are quantized as one layer.

    As for ONNX, the cost of a layer is its share of the activations.

    Args:
        graph: the network, with the shapes of its values in the metadata.
        without_weights: operators without weights that are quantized, by the names of their overload packets.
    """
    nodes = [node for node in graph.graph.nodes if node.target in WITH_WEIGHTS]
    sizes = {node.name: count_elements(node) + count_elements(node.args[0]) for node in nodes}
    total = max(1, sum(sizes.values()))
    layers = [Layer(name, (name,), size / total + _MIN_COST) for name, size in sizes.items()]
    others = tuple(node.name for node in graph.graph.nodes if packet_name(node) in without_weights)
    return [*layers, Layer("operators without weights", others, _MIN_COST, has_weights=False)] if others else layers


def count_macs(graph: GraphModule) -> dict[str, int]:
    """Return the multiply-accumulate operations of each layer with weights for one image, by the name of its node."""
    return {
        # for each output element, the weights of its channel
        node.name: count_elements(node) * count_elements(node.args[1])
        for node in graph.graph.nodes
        if node.target in WITH_WEIGHTS
    }


def count_elements(node: Node) -> int:
    """Return the number of elements of an activation for one image, or of a weight for one channel.

    The batch of an activation may be any of its dimensions, or a factor of one: it is the only symbol of their sizes.
    """
    shape: Sequence[int | SymInt] = node.meta["val"].shape
    if all(isinstance(size, int) for size in shape):
        return math.prod(map(int, shape[1:]))
    return math.prod(_size_for_one_image(size) for size in shape)


def _size_for_one_image(size: int | SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def packet_name(node: Node) -> str:
    """Return the name of an operator without its overload, such as `add`; empty for what is not an operator."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__.rstrip("_") if packet is not None else ""


def run_in_batches(network: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the outputs of a network, (N, output_size), for inputs (N, *input.shape)."""
    return np.concatenate(
        [run(network, inputs[start : start + _BATCH_SIZE]) for start in range(0, len(inputs), _BATCH_SIZE)]
    )


def run(network: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the outputs of a network for one batch."""
    with torch.no_grad():
        outputs: NDArray[np.float32] = network(torch.from_numpy(inputs)).numpy()
    return outputs
