"""The int8 operators of oneDNN as functions without side effects, and their replacement when they are compiled.

PyTorch has these operators, but its exporter cannot trace them all: one has no implementation for shapes, one writes to
its argument. Inductor compiles them from the originals. Its own passes that would find them are not part of PyTorch.
"""

from typing import Any, Final

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor
from torch.fx import Graph, Node

_LIBRARY: Final = torch.library.Library("cifarx_int8", "DEF")
_ADDING: Final = torch.ops.onednn.qconv2d_pointwise.binary
_ACCUMULATOR: Final = 6
"""The position of the tensor that the convolution is added to."""

_LIBRARY.define(
    "pack_convolution(Tensor weight, Tensor scales, float x_scale, int x_zero_point, int[] stride, int[] padding, "
    "int[] dilation, int groups) -> Tensor"
)
_LIBRARY.define(
    "convolution_add(Tensor x, float x_scale, int x_zero_point, Tensor weight, Tensor weight_scales, "
    "Tensor weight_zero_points, Tensor accumulator, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, float output_scale, int output_zero_point, ScalarType? output_dtype, float accumulator_scale, "
    "int accumulator_zero_point, str binary, Scalar? alpha, str? unary, Scalar?[] unary_scalars, "
    "str? unary_algorithm) -> Tensor"
)


def _pack_convolution(*arguments: Any) -> Tensor:
    packed: Tensor = torch.ops.onednn.qconv_prepack(*arguments)
    return packed


def _shape_of_packed(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


def _convolution_add(*arguments: Any) -> Tensor:
    accumulator = arguments[_ACCUMULATOR].clone(memory_format=torch.channels_last)
    result: Tensor = _ADDING(*arguments[:_ACCUMULATOR], accumulator, *arguments[_ACCUMULATOR + 1 :])
    return result


_LIBRARY.impl("pack_convolution", _pack_convolution, "CPU")
_LIBRARY.impl("pack_convolution", _shape_of_packed, "Meta")
# Not for the CPU alone: to PyTorch, the packed weights are on another device.
_LIBRARY.impl("convolution_add", _convolution_add, "CompositeExplicitAutograd")
_LIBRARY.impl("convolution_add", _ADDING, "Meta")

PACK_CONVOLUTION: Final = torch.ops.cifarx_int8.pack_convolution.default
"""Weights as the convolution of oneDNN takes them. Compiling replaces it by its result."""

CONVOLUTION_ADD: Final = torch.ops.cifarx_int8.convolution_add.default
"""A convolution that is added to a tensor of the same data type, such as the input of a residual block."""

CONVOLUTION: Final = torch.ops.onednn.qconv_pointwise.default
PACK_LINEAR: Final = torch.ops.onednn.qlinear_prepack.default
LINEAR: Final = torch.ops.onednn.qlinear_pointwise.default
MAX_POOL: Final = torch.ops.quantized.max_pool2d.default


_FRESH: Final = (CONVOLUTION, CONVOLUTION_ADD, _ADDING, MAX_POOL)
"""Operators whose result is in memory of its own."""

_READING: Final = (*_FRESH, torch.ops.quantized_decomposed.dequantize_per_tensor.default)
"""Operators that are done with their argument when they return, and do not return a view of it."""


def write_in_place(graph: Graph) -> None:
    """Replace `CONVOLUTION_ADD` in a graph that Inductor compiles by the operator that writes to its argument.

    A tensor that is needed for anything else is copied first.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node, position in order.items():
        if node.target is not CONVOLUTION_ADD:
            continue
        accumulator = node.args[_ACCUMULATOR]
        assert isinstance(accumulator, Node)
        others = [user for user in accumulator.users if user is not node]
        is_done = all(user.target in _READING and order[user] < position for user in others)
        if accumulator.target not in _FRESH or accumulator is node.args[0] or not is_done:
            with graph.inserting_before(node):
                copied = graph.call_function(torch.ops.aten.clone.default, (accumulator,))
            copied.meta["val"] = accumulator.meta["val"]
            node.update_arg(_ACCUMULATOR, copied)
        node.target = _ADDING
