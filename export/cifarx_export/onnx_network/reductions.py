"""Operators that combine the values along axes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from cifarx_export.onnx_network.node import Node, Operator
from cifarx_export.onnx_network.values import Value, as_sizes, to_list

_PER_AXIS_OPSET: Final = 13
"""The opset since which a softmax is over one axis instead of all axes from one on."""


def _axes(node: Node, data: Tensor, axes: Value | None) -> list[int] | None:
    """Return the axes to reduce, or None for no reduction."""
    given = node.get("axes") if axes is None else to_list(axes)
    if given:
        return list(given)
    return None if node.get("noop_with_empty_axes", 0) else list(range(data.dim()))


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def compute(node: Node, data: Value, axes: Value | None = None) -> Value:
        keeps = bool(node.get("keepdims", 1))
        if not isinstance(data, Tensor):  # a product or sum of sizes
            return _reduce_sizes(node, data)
        chosen = _axes(node, data, axes)
        return data if chosen is None else function(data, chosen, keeps)

    return compute


def _reduce_sizes(node: Node, sizes: Value) -> Value:
    """Return the product of all sizes, as the number of elements is computed from a shape."""
    if node.operator != "ReduceProd" or isinstance(sizes, Tensor):
        raise NotImplementedError(f"{node.operator} of a shape")
    product = 1
    for size in to_list(sizes):
        product = product * size
    scalar = as_sizes(product)
    return scalar.reshape([1] * sizes.ndim) if node.get("keepdims", 1) else scalar


def _product(data: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % data.dim() for axis in axes), reverse=True):
        data = data.prod(axis, keepdim=keepdim)
    return data


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def compute(node: Node, data: Tensor) -> Tensor:
        if node.opset >= _PER_AXIS_OPSET:
            return function(data, node.get("axis", -1))
        axis = node.get("axis", 1) % data.dim()
        return function(data.flatten(axis), axis).reshape(data.shape)

    return compute


def _arg_max(node: Node, data: Tensor) -> Tensor:
    if node.get("select_last_index", 0):
        raise NotImplementedError("ArgMax of the last maximum")
    return data.argmax(node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))


def _lp_normalization(node: Node, data: Tensor) -> Tensor:
    return functional.normalize(data, node.get("p", 2), node.get("axis", -1), eps=0.0)


REDUCTIONS: Final[Mapping[str, Operator]] = MappingProxyType(
    {
        "ArgMax": _arg_max,
        "LogSoftmax": _softmax(torch.log_softmax),
        "LpNormalization": _lp_normalization,
        "ReduceL1": _reduction(lambda data, axes, keepdim: data.abs().sum(axes, keepdim)),
        "ReduceL2": _reduction(lambda data, axes, keepdim: torch.linalg.vector_norm(data, 2, axes, keepdim)),
        "ReduceLogSumExp": _reduction(lambda data, axes, keepdim: data.logsumexp(axes, keepdim)),
        "ReduceMax": _reduction(lambda data, axes, keepdim: data.amax(axes, keepdim)),
        "ReduceMean": _reduction(lambda data, axes, keepdim: data.mean(axes, keepdim)),
        "ReduceMin": _reduction(lambda data, axes, keepdim: data.amin(axes, keepdim)),
        "ReduceProd": _reduction(_product),
        "ReduceSum": _reduction(lambda data, axes, keepdim: data.sum(axes, keepdim)),
        "ReduceSumSquare": _reduction(lambda data, axes, keepdim: data.square().sum(axes, keepdim)),
        "Softmax": _softmax(torch.softmax),
    }
)
