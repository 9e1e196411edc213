"""Quantization of the weights of an ONNX model with GPTQ."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor

from cifarx_export.formats.int8.gptq import (
    MAX_IN_FEATURES,
    convolution_rows,
    linear_rows,
    quantize_columns,
    rows_per_batch,
)
from cifarx_export.formats.onnx.int8.inference import iterate_activations
from cifarx_export.formats.onnx.int8.layers import nodes_with_weights


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
        levels = quantize_columns(matrix, torch.from_numpy(scales[name].copy()), hessian).numpy()
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
        limit = rows_per_batch(len(batch["input"]), len(inputs))
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
    return is_usual and _in_features(node, shape) <= MAX_IN_FEATURES


def _input_rows(node: NodeProto, shape: tuple[int, ...], activation: Tensor, limit: int) -> Tensor:
    """Return about `limit` of the rows that a layer multiplies by its weights, evenly spread: (rows, in_features).

    Args:
        node: the layer.
        shape: the shape of its weights.
        activation: its input.
        limit: the number of rows.
    """
    if node.op_type != "Conv":
        return linear_rows(activation, limit)
    attributes = _attributes(node)
    strides, pads = attributes.get("strides", [1, 1]), attributes.get("pads", [0, 0, 0, 0])
    return convolution_rows(activation, shape[2:], strides, pads, attributes.get("dilations", [1, 1]), limit)


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
