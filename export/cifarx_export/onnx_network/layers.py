"""Operators with weights or windows: convolutions, products, normalizations and pooling."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  the usual name
from torch import Tensor

from cifarx_export.onnx_network.node import Node, Operator
from cifarx_export.onnx_network.values import Value, to_list

_CONVOLUTIONS: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType({1: F.conv1d, 2: F.conv2d, 3: F.conv3d})
_MAX_POOLS: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType(
    {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
)
_AVERAGE_POOLS: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType(
    {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
)

_PAD_MODES: Final = MappingProxyType({"constant": "constant", "edge": "replicate", "reflect": "reflect"})


def _padding(node: Node, data: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return how much is added before and after each axis of an image."""
    axes = len(kernel)
    mode = node.get("auto_pad", b"NOTSET").decode()
    if mode in ("NOTSET", ""):
        pads = list(node.get("pads", [0] * (2 * axes)))
        return pads[:axes], pads[axes:]
    if mode == "VALID":
        return [0] * axes, [0] * axes
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    before, after = [], []
    for size, window, stride, dilation in zip(data.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(less if mode == "SAME_UPPER" else more)
        after.append(more if mode == "SAME_UPPER" else less)
    return before, after


def _flat(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return the padding as `F.pad` takes it: the last axis first."""
    return [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]


def _convolve(node: Node, data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.dim() - 2
    before, after = _padding(node, data, weight.shape[2:])
    if before != after:
        data, before = F.pad(data, _flat(before, after)), [0] * axes
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    return _CONVOLUTIONS[axes](data, weight, bias, strides, before, dilations, node.get("group", 1))


def _max_pool(node: Node, data: Tensor) -> Tensor:
    if len(node.outputs) > 1:
        raise NotImplementedError("MaxPool with the positions of the maxima")
    kernel = node.get("kernel_shape")
    before, after = _padding(node, data, kernel)
    strides, dilations = node.get("strides", [1] * len(kernel)), node.get("dilations", [1] * len(kernel))
    ceil, pool = bool(node.get("ceil_mode", 0)), _MAX_POOLS[len(kernel)]
    if before == after and not _is_wide(before, kernel):
        return pool(data, kernel, strides, before, dilations, ceil)
    padded = F.pad(data, _flat(before, after), value=-torch.inf)
    return _crop(pool(padded, kernel, strides, 0, dilations, ceil), data, before, strides)


def _average_pool(node: Node, data: Tensor) -> Tensor:
    kernel = node.get("kernel_shape")
    if any(step != 1 for step in node.get("dilations", ())):
        raise NotImplementedError("AveragePool with dilations")
    before, after = _padding(node, data, kernel)
    strides, ceil = node.get("strides", [1] * len(kernel)), bool(node.get("ceil_mode", 0))
    counts_padding, pool = bool(node.get("count_include_pad", 0)), _AVERAGE_POOLS[len(kernel)]
    if before == after and not _is_wide(before, kernel):
        return pool(data, kernel, strides, before, ceil, counts_padding)
    padding = _flat(before, after)
    averages = pool(F.pad(data, padding), kernel, strides, 0, ceil)
    if not counts_padding:
        counted = F.pad(torch.ones_like(data[:1, :1]), padding)
        averages = averages / pool(counted, kernel, strides, 0, ceil)
    return _crop(averages, data, before, strides)


def _crop(pooled: Tensor, data: Tensor, before: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Leave out the windows that start behind the image, in the padding: `ceil_mode` does not add them."""
    for axis, (padding, stride) in enumerate(zip(before, strides, strict=True), start=2):
        windows = -(-(data.shape[axis] + padding) // stride)
        if windows < pooled.shape[axis]:
            pooled = pooled.narrow(axis, 0, windows)
    return pooled


def _is_wide(padding: Sequence[int], kernel: Sequence[int]) -> bool:
    """Return whether a padding is larger than PyTorch's pooling takes: half of the window."""
    return any(2 * size > window for size, window in zip(padding, kernel, strict=True))


def _global_average_pool(_node: Node, data: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(data, 1) if data.dim() == 4 else data.mean(_image_axes(data), keepdim=True)


def _global_max_pool(_node: Node, data: Tensor) -> Tensor:
    return data.amax(_image_axes(data), keepdim=True)


def _image_axes(data: Tensor) -> list[int]:
    return list(range(2, data.dim()))


def _multiply_matrices(_node: Node, left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def _gemm(node: Node, left: Tensor, right: Tensor, added: Tensor | None = None) -> Tensor:
    product = (left.mT if node.get("transA", 0) else left) @ (right.mT if node.get("transB", 0) else right)
    scaled: Tensor = node.get("alpha", 1.0) * product
    return scaled if added is None else scaled + node.get("beta", 1.0) * added


def _batch_normalization(node: Node, data: Tensor, *statistics: Tensor) -> Tensor:
    if len([name for name in node.outputs if name]) > 1:
        raise NotImplementedError("BatchNormalization in training mode")
    scale, bias, mean, variance = statistics
    return F.batch_norm(data, mean, variance, scale, bias, eps=node.get("epsilon", 1e-5))


def _layer_normalization(node: Node, data: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = data.shape[node.get("axis", -1) :]
    return F.layer_norm(
        data,
        axes,
        scale.expand(axes),
        None if bias is None else bias.expand(axes),
        node.get("epsilon", 1e-5),
    )


def _instance_normalization(node: Node, data: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(data, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


def _group_normalization(node: Node, data: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups, channels = node.get("num_groups"), data.shape[1]
    if len(scale) != channels:  # before opset 21: one value per group
        scale, bias = (value.repeat_interleave(channels // groups) for value in (scale, bias))
    return F.group_norm(data, groups, scale, bias, node.get("epsilon", 1e-5))


def _local_response_normalization(node: Node, data: Tensor) -> Tensor:
    size, alpha = node.get("size"), node.get("alpha", 1e-4)
    return F.local_response_norm(data, size, alpha, node.get("beta", 0.75), node.get("bias", 1.0))


def _pad(
    node: Node, data: Tensor, pads: Value | None = None, value: Value | None = None, axes: Value | None = None
) -> Tensor:
    mode = node.get("mode", b"constant").decode()
    if mode not in _PAD_MODES:
        raise NotImplementedError(f"Pad with the mode {mode}")
    sizes = list(node.get("pads")) if pads is None else to_list(pads)
    padded = list(range(data.dim())) if axes is None else [axis % data.dim() for axis in to_list(axes)]
    before, after = [0] * data.dim(), [0] * data.dim()
    for position, axis in enumerate(padded):
        before[axis], after[axis] = sizes[position], sizes[position + len(padded)]
    if value is not None:
        raise NotImplementedError("Pad with a value that is not constant")
    if mode == "constant":
        return F.pad(data, _flat(before, after), value=node.get("value", 0.0))
    if any(before[:2]) or any(after[:2]):
        raise NotImplementedError(f"Pad of channels with the mode {mode}")
    return F.pad(data, _flat(before[2:], after[2:]), mode=_PAD_MODES[mode])


def _resize(node: Node, data: Tensor, *inputs: Any) -> Tensor:
    """Resize images as `F.interpolate` does. Other rules for the positions of pixels are not supported."""
    factors = node.get("scales")
    if len(inputs) > 2 and inputs[2] is not None:
        size = to_list(inputs[2])[2:]
    elif factors is not None:
        size = [int(old * factor) for old, factor in zip(data.shape[2:], factors[2:], strict=True)]
    else:
        raise NotImplementedError("Resize without constant scales or sizes")
    mode = node.get("mode", b"nearest").decode()
    rule = node.get("coordinate_transformation_mode", b"half_pixel").decode()
    rounding = node.get("nearest_mode", b"round_prefer_floor").decode()
    if mode == "nearest" and (rule, rounding) == ("asymmetric", "floor"):
        return F.interpolate(data, size, mode="nearest")
    if mode == "linear" and data.dim() == 4 and rule in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return F.interpolate(data, size, mode="bilinear", align_corners=rule == "align_corners")
    raise NotImplementedError(f"Resize with the mode {mode}, {rule}")


LAYERS: Final[Mapping[str, Operator]] = MappingProxyType(
    {
        "AveragePool": _average_pool,
        "BatchNormalization": _batch_normalization,
        "Conv": _convolve,
        "Gemm": _gemm,
        "GlobalAveragePool": _global_average_pool,
        "GlobalMaxPool": _global_max_pool,
        "GroupNormalization": _group_normalization,
        "InstanceNormalization": _instance_normalization,
        "LRN": _local_response_normalization,
        "LayerNormalization": _layer_normalization,
        "MatMul": _multiply_matrices,
        "MaxPool": _max_pool,
        "Pad": _pad,
        "Resize": _resize,
    }
)
