"""Quantization of weights with GPTQ, which preserves the outputs of a layer rather than its weights.

The method is from Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022. The weights of a layer are quantized column by column. The remaining columns are adjusted to compensate for the
quantization error, according to the correlations of the layer's inputs on the calibration images.
"""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from cifarx_export.formats.onnx.int8.inference import iterate_activations
from cifarx_export.formats.onnx.int8.layers import nodes_with_weights

QUANT_MAX: Final = 64
"""Largest quantized weight: weights of 7 bits are from -64 to 64."""

_MAX_ROWS: Final = 16384
"""Number of input rows that the Hessian of a layer is computed from. The rows of a convolution are patches."""

_MAX_IN_FEATURES: Final = 4608
"""Most input features of a layer that GPTQ is applied to, because the Hessian has their square as its size (512
channels under a 3x3 kernel). The weights of larger layers are rounded to the nearest integer."""

_DAMPING: Final = 0.01
"""Fraction of the mean of the Hessian's diagonal that is added to the diagonal; from the paper."""

_BLOCK_SIZE: Final = 128
"""Number of columns after which the remaining columns are updated; from the paper."""


def quantize_weights(
    model: ModelProto, quantized: ModelProto, inputs: NDArray[np.float32]
) -> dict[str, NDArray[np.int8]]:
    """Return quantized weights for a model, by the name of the initializer.

    Args:
        model: the fp32 model.
        quantized: the same model with every layer quantized, which holds the scales.
        inputs: preprocessed calibration images, (N, *input.shape).
    """
    initializers = {tensor.name: tensor for tensor in quantized.graph.initializer}
    scales = {
        node.input[0]: numpy_helper.to_array(initializers[node.input[1]])
        for node in quantized.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers
    }
    originals = {tensor.name: tensor for tensor in model.graph.initializer}
    results = {}
    for node, hessian in _compute_hessians(model, inputs):
        name = f"{node.input[1]}_quantized"
        if name not in scales:
            continue
        weights = numpy_helper.to_array(originals[node.input[1]])
        matrix = torch.from_numpy(_as_matrix(node, weights))
        levels = _quantize_columns(matrix, torch.from_numpy(scales[name].copy()), hessian).numpy()
        results[name] = np.ascontiguousarray(
            levels.reshape(weights.shape) if _has_outputs_first(node) else levels.T, np.int8
        )
    return results


def _compute_hessians(model: ModelProto, inputs: NDArray[np.float32]) -> list[tuple[NodeProto, Tensor]]:
    """Return each layer with its Hessian, the sum of x xᵀ over its input rows x: (in_features, in_features)."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in nodes_with_weights(model) if _is_supported(node, shapes[node.input[1]])]
    hessians = [torch.zeros(()) for _ in nodes]
    for batch in iterate_activations(model, list(dict.fromkeys(node.input[0] for node in nodes)), inputs):
        limit = max(1, _MAX_ROWS * len(batch["input"]) // len(inputs))
        for index, node in enumerate(nodes):
            activation = torch.from_numpy(np.array(batch[node.input[0]]))
            rows = _input_rows(node, shapes[node.input[1]], activation, limit)
            hessians[index] = hessians[index] + rows.T @ rows
    return list(zip(nodes, hessians, strict=True))


def _is_supported(node: NodeProto, shape: tuple[int, ...]) -> bool:
    """Return whether the input rows of a layer are known. The weights of others are rounded to the nearest integer."""
    attributes = _attributes(node)
    is_usual = node.op_type != "Conv" or (
        len(shape) == 4 and attributes.get("group", 1) == 1 and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    )
    return is_usual and _in_features(node, shape) <= _MAX_IN_FEATURES


def _input_rows(node: NodeProto, shape: tuple[int, ...], activation: Tensor, limit: int) -> Tensor:
    """Return about `limit` of the rows that a layer multiplies by its weights, evenly spread: (rows, in_features).

    Args:
        node: the layer.
        shape: the shape of its weights.
        activation: its input.
        limit: the number of rows.
    """
    if node.op_type == "Conv":
        attributes = _attributes(node)
        strides, pads = attributes.get("strides", [1, 1]), attributes.get("pads", [0, 0, 0, 0])
        positions = max(1, activation.shape[2] * activation.shape[3] // (strides[0] * strides[1]))
        activation = activation[:: max(1, len(activation) * positions // (4 * limit))]  # unfolding takes much memory
        top, left, bottom, right = pads
        padded = functional.pad(activation, (left, right, top, bottom))
        patches = functional.unfold(padded, shape[2:], attributes.get("dilations", [1, 1]), stride=strides)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    else:
        rows = activation.reshape(-1, activation.shape[-1])
    return rows[:: max(1, len(rows) // limit)]


def _quantize_columns(weights: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """Return integers as floats, (out_features, in_features), for weights of that shape and scales (out_features,)."""
    inverse = _inverse_cholesky(hessian)
    remaining, levels = weights.clone(), torch.empty_like(weights)
    for start in range(0, weights.shape[1], _BLOCK_SIZE):
        stop = min(start + _BLOCK_SIZE, weights.shape[1])
        block, factor = remaining[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors = torch.empty_like(block)
        for column in range(stop - start):
            level = (block[:, column] / scales).round().clamp(-QUANT_MAX, QUANT_MAX)
            levels[:, start + column] = level
            errors[:, column] = (block[:, column] - level * scales) / factor[column, column]
            block[:, column:] -= errors[:, column, None] * factor[column, column:]
        remaining[:, stop:] -= errors @ inverse[start:stop, stop:]
    return levels


def _inverse_cholesky(hessian: Tensor) -> Tensor:
    """Return the upper triangular R with Rᵀ R = H⁻¹, where H is the damped Hessian.

    R is the inverse of the upper triangular U with U Uᵀ = H, a Cholesky decomposition from the last row upwards.
    """
    damped = hessian.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp(min=1e-6))
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
    return inverse.float()


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _has_outputs_first(node: NodeProto) -> bool:
    """Return whether the first axis of the weights is that of the outputs."""
    return node.op_type == "Conv" or bool(_attributes(node).get("transB", 0))


def _in_features(node: NodeProto, shape: tuple[int, ...]) -> int:
    """Return the number of input features of a layer with weights of this shape."""
    return int(np.prod(shape[1:])) if _has_outputs_first(node) else shape[0]


def _as_matrix(node: NodeProto, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the weights as (out_features, in_features)."""
    return weights.reshape(len(weights), -1).copy() if _has_outputs_first(node) else np.ascontiguousarray(weights.T)
