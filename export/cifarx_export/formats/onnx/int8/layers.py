"""The layers of an ONNX model that can be quantized, and what they cost."""

import math
from typing import Final

from onnx import ModelProto, NodeProto

from cifarx_export.formats.int8.search import Layer
from cifarx_export.formats.onnx.int8.inference import elements_per_image, float_tensors

_MIN_COST: Final = 0.02
"""Lowest cost of leaving a layer in fp32. Also the cost of the residual additions, as measured on ResNet-18."""


def find_layers(model: ModelProto) -> list[Layer]:
    """Return the layers with weights in graph order, then the residual additions with their ReLUs as one layer.

    The cost of a layer is its share of the activations, not of the multiplications. Large float tensors and the
    conversions to and from integers are what is slow. On ResNet-18 (32x32 images, batch size 64, AVX-512), leaving the
    first convolution in fp32 reduced the speedup from 1.53 to 1.23, whereas leaving the last three in fp32, which have
    ten times its multiplications, increased it to 1.86.
    """
    sizes = _activation_sizes(model)
    total = max(1, sum(sizes.values()))
    layers = [Layer(name, (name,), size / total + _MIN_COST) for name, size in sizes.items()]
    additions = residual_additions(model)
    sums = {node.output[0] for node in additions}
    additions += [node for node in model.graph.node if node.op_type == "Relu" and node.input[0] in sums]
    names = tuple(node.name for node in additions)
    return [*layers, Layer("additions", names, _MIN_COST, has_weights=False)] if names else layers


def residual_additions(model: ModelProto) -> list[NodeProto]:
    """Return the additions of two activations of which at least one is the output of a convolution.

    Other additions stay in fp32. A bias after a matrix product costs nothing there, and the sums of a transformer are
    the input of a normalization, which takes floats. On a Swin transformer, quantizing these sums cost 1.6 % of the
    agreement even with every layer in fp32.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    convolved = {name for node in model.graph.node if node.op_type == "Conv" for name in node.output}
    additions = (node for node in model.graph.node if node.op_type == "Add" and not weights.intersection(node.input))
    return [node for node in additions if convolved.intersection(node.input)]


def nodes_with_weights(model: ModelProto) -> list[NodeProto]:
    """Return the convolutions and matrix products with constant weights, in graph order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights and node.input[0] not in weights
    ]


def macs_per_image(model: ModelProto) -> dict[str, int]:
    """Return the multiply-accumulate operations of each node with weights, by name. Shapes must have been inferred."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    outputs = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    macs = {}
    for node in nodes_with_weights(model):
        dims = [dim.dim_value for dim in outputs[node.output[0]].type.tensor_type.shape.dim][1:]  # unknown axes are 0
        # An element of the output takes as many multiplications as its channel has weights.
        channels = shapes[node.input[1]][0] if node.op_type == "Conv" else dims[-1]
        macs[node.name] = math.prod(dims) * sizes[node.input[1]] // max(1, channels)
    return macs


def _activation_sizes(model: ModelProto) -> dict[str, int]:
    """Return the number of input and output elements per image of each node with weights, by name."""
    values = float_tensors(model)
    return {
        node.name: elements_per_image(values[node.input[0]]) + elements_per_image(values[node.output[0]])
        for node in nodes_with_weights(model)
    }
