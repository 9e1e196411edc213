"""Weights rounded so that the layers' outputs stay, not the weights: each rounding makes up for those before it.

The method is GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022): column by column, the error of a rounded column is taken up by the columns that are still to be
rounded, as far as the layer's inputs on the calibration images make them alike.
"""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from cifarx_export.formats.onnx.int8.calibration import activations
from cifarx_export.formats.onnx.int8.layers import weighted_nodes

LARGEST_LEVEL: Final = 64
"""Of a weight of 7 bits: -64 to 64."""

_ROWS: Final = 16384
"""Inputs of a layer that its correlations are taken from: of a convolution, so many patches."""

_LARGEST_INPUT: Final = 4608
"""Values that a layer with correlations takes: their matrix has the square (512 channels under 3x3). The weights of
layers with more are rounded to the nearest."""

_DAMPING: Final = 0.01
"""Added to the diagonal, as a share of its mean; the paper's."""

_BLOCK: Final = 128
"""Columns between updates of all that follow; the paper's."""


def round_weights(model: Any, quantized: Any, inputs: NDArray[np.float32]) -> dict[str, NDArray[np.int8]]:
    """Better integers for a quantized network's weights, by the initializer's name.

    Args:
        model: the fp32 network.
        quantized: the same with every layer quantized: it has the scales.
        inputs: calibration images as inputs, (N, 3, height, width).
    """
    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    scales = {
        node.input[0]: numpy_helper.to_array(constants[node.input[1]])
        for node in quantized.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    originals = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node, correlations in _correlations(model, inputs):
        name = f"{node.input[1]}_quantized"
        if name not in scales:
            continue
        weights = numpy_helper.to_array(originals[node.input[1]])
        rows = _rows(node, weights)
        rounded = _round(torch.from_numpy(rows), torch.from_numpy(scales[name].copy()), correlations).numpy()
        found[name] = np.ascontiguousarray(
            rounded.reshape(weights.shape) if _channel_first(node) else rounded.T, np.int8
        )
    return found


def _correlations(model: Any, inputs: NDArray[np.float32]) -> list[tuple[Any, Tensor]]:
    """Of each layer, the sum over its input rows x of x xᵀ: (inputs, inputs)."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in weighted_nodes(model) if _takes(node, shapes[node.input[1]]) <= _LARGEST_INPUT]
    nodes = [node for node in nodes if _attributes(node).get("group", 1) == 1]
    sums = [torch.zeros(()) for _ in nodes]
    done = 0
    for batch in activations(model, list(dict.fromkeys(node.input[0] for node in nodes)), inputs):
        size = len(batch["input"])
        done += size
        limit = max(1, _ROWS * size // len(inputs))
        for number, node in enumerate(nodes):
            rows = _input_rows(node, torch.from_numpy(np.array(batch[node.input[0]])), limit)
            sums[number] = sums[number] + rows.T @ rows
    return list(zip(nodes, sums, strict=True))


def _input_rows(node: Any, values: Tensor, limit: int) -> Tensor:
    """At most about `limit` of what a layer's weights are multiplied with, spread evenly: (rows, inputs)."""
    if node.op_type == "Conv":
        attributes = _attributes(node)
        strides, pads = attributes.get("strides", [1, 1]), attributes.get("pads", [0, 0, 0, 0])
        positions = max(1, values.shape[2] * values.shape[3] // (strides[0] * strides[1]))
        values = values[:: max(1, len(values) * positions // (4 * limit))]  # unfolding is what takes memory
        top, left, bottom, right = pads
        padded = functional.pad(values, (left, right, top, bottom))
        patches = functional.unfold(
            padded, attributes["kernel_shape"], attributes.get("dilations", [1, 1]), stride=strides
        )
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    else:
        rows = values.reshape(-1, values.shape[-1])
    return rows[:: max(1, len(rows) // limit)]


def _round(weights: Tensor, scales: Tensor, correlations: Tensor) -> Tensor:
    """Integers, (outputs, inputs), for weights of that shape; `scales` (outputs,)."""
    inverse = _inverse_factor(correlations)
    remaining, levels = weights.clone(), torch.empty_like(weights)
    for start in range(0, weights.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weights.shape[1])
        block, factor = remaining[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors = torch.empty_like(block)
        for column in range(stop - start):
            level = (block[:, column] / scales).round().clamp(-LARGEST_LEVEL, LARGEST_LEVEL)
            levels[:, start + column] = level
            errors[:, column] = (block[:, column] - level * scales) / factor[column, column]
            block[:, column:] -= errors[:, column, None] * factor[column, column:]
        remaining[:, stop:] -= errors @ inverse[start:stop, stop:]
    return levels


def _inverse_factor(correlations: Tensor) -> Tensor:
    """The upper R with Rᵀ R = H⁻¹, H damped: the inverse of the upper U with U Uᵀ = H, Cholesky's from the end."""
    damped = correlations.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp(min=1e-6))
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
    return inverse.float()


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _channel_first(node: Any) -> bool:
    """Whether the weights' first axis is the outputs'."""
    return node.op_type == "Conv" or bool(_attributes(node).get("transB", 0))


def _takes(node: Any, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape[1:])) if _channel_first(node) else shape[0]


def _rows(node: Any, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """(outputs, inputs)."""
    return weights.reshape(len(weights), -1).copy() if _channel_first(node) else np.ascontiguousarray(weights.T)
