"""Operators that move, select or repeat values without changing them, and those that compute shapes."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from cifarx_export.onnx_network.node import Node, Operator
from cifarx_export.onnx_network.values import Value, as_sizes, make_sizes, to_list, to_tensor

_NO_LIMIT: Final = 2**31 - 1
"""The end of a slice from which on exporters mean the end of the axis."""


def _given(node: Node, name: str, value: Value | None) -> list[Any] | None:
    """Return integers that are an attribute in older opsets, and an input in newer ones."""
    if value is not None:
        return to_list(value)
    found = node.get(name)
    return None if found is None else list(found)


def _shape(node: Node, data: Value) -> Value:
    return make_sizes(list(data.shape)[node.get("start", 0) : node.get("end")])


def _size(_node: Node, data: Value) -> Value:
    return as_sizes(math.prod(data.shape))


def _reshape(node: Node, data: Value, shape: Value) -> Value:
    sizes = to_list(shape)
    if not node.get("allowzero", 0):
        sizes = [data.shape[axis] if _is_zero(size) else size for axis, size in enumerate(sizes)]
    return data.reshape(sizes)


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0  # a symbolic size is that of a batch


def _flatten(node: Node, data: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis % data.dim() if axis < 0 else axis
    if axis == 1:
        return data.flatten(1)
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


def _transpose(node: Node, data: Value) -> Value:
    axes = node.get("perm") or list(reversed(range(data.ndim)))
    return data.permute(axes) if isinstance(data, Tensor) else data.transpose(axes)


def _squeeze(node: Node, data: Value, axes: Value | None = None) -> Value:
    chosen = _given(node, "axes", axes)
    if chosen is None:
        chosen = [axis for axis, size in enumerate(data.shape) if isinstance(size, int) and size == 1]
    for axis in sorted((axis % data.ndim for axis in chosen), reverse=True):
        data = data.squeeze(axis)
    return data


def _unsqueeze(node: Node, data: Value, axes: Value | None = None) -> Value:
    chosen = _given(node, "axes", axes) or []
    rank = data.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        data = data.unsqueeze(axis) if isinstance(data, Tensor) else np.expand_dims(data, axis)
    return data


def _concat(node: Node, *parts: Value) -> Value:
    if any(isinstance(part, Tensor) for part in parts):
        return torch.cat([to_tensor(part) for part in parts], node.get("axis"))
    return np.concatenate(parts, node.get("axis"))


def _split(node: Node, data: Tensor, sizes: Value | None = None) -> Sequence[Tensor]:
    axis, count = node.get("axis", 0), len(node.outputs)
    given = _given(node, "split", sizes)
    if given is None:
        part = -(-data.shape[axis] // count)
        given = [part] * (count - 1) + [data.shape[axis] - part * (count - 1)]
    return torch.split(data, given, axis)


def _slice(node: Node, data: Value, *inputs: Value | None) -> Value:
    """Slice along axes. Symbolic bounds are kept as they are."""
    starts, ends, axes, steps = (
        _given(node, name, inputs[position] if position < len(inputs) else None)
        for position, name in enumerate(("starts", "ends", "axes", "steps"))
    )
    assert starts is not None
    assert ends is not None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        data = _slice_axis(data, axis % data.ndim, start, end, step)
    return data


def _slice_axis(data: Value, axis: int, start: Any, end: Any, step: int) -> Value:
    if isinstance(end, int) and end >= _NO_LIMIT:
        end = None
    if isinstance(data, Tensor) and step < 0:
        positions = _reversed_positions(int(data.shape[axis]), start, end, step)
        return data.index_select(axis, torch.tensor(positions, dtype=torch.int64))
    window = (*[slice(None)] * axis, slice(start, end, step))
    return data[window]


def _reversed_positions(size: int, start: int, end: int | None, step: int) -> list[int]:
    """Return the positions of a slice with a negative step. Unlike in Python, its start is moved into the axis."""
    last = size - 1 if end is None else end
    first = min(max(start + size if start < 0 else start, 0), size - 1)
    return list(range(first, max(last + size if last < 0 else last, -1), step))


def _gather(node: Node, data: Value, indices: Value) -> Value:
    axis = node.get("axis", 0) % data.ndim
    if not isinstance(data, Tensor):
        return as_sizes(np.take(data, np.array(_nested(indices), np.int64), axis))
    if isinstance(indices, Tensor):
        chosen = torch.where(indices < 0, indices + data.shape[axis], indices)
        found = data.index_select(axis, chosen.flatten())
        return found.reshape([*data.shape[:axis], *chosen.shape, *data.shape[axis + 1 :]])
    if indices.ndim == 0:
        return data.select(axis, indices.item())
    positions = [index % data.shape[axis] for index in to_list(indices)]
    found = data.index_select(axis, torch.tensor(positions, dtype=torch.int64))
    return found.reshape([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]])


def _gather_nd(node: Node, data: Value, indices: Value) -> Tensor:
    if node.get("batch_dims", 0):
        raise NotImplementedError("GatherND with axes of a batch")
    return to_tensor(data)[to_tensor(indices).unbind(-1)]


def _scatter_nd(node: Node, data: Value, indices: Value, updates: Value) -> Tensor:
    if node.get("reduction", b"none") != b"none":
        raise NotImplementedError("ScatterND with a reduction")
    return torch.index_put(to_tensor(data), to_tensor(indices).unbind(-1), to_tensor(updates))


def _nested(indices: Value) -> Any:
    if isinstance(indices, Tensor):
        raise NotImplementedError("a shape that depends on the values of the images")
    return indices.tolist()


def _expand(_node: Node, data: Value, shape: Value) -> Value:
    """Expand a value. Unlike `Tensor.expand`, a size of 1 keeps the larger one of the value."""
    if not isinstance(data, Tensor):
        return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(to_list(shape))))
    sizes = to_list(shape)
    kept = [1] * (len(sizes) - data.dim()) + list(data.shape)
    sizes = [1] * (len(kept) - len(sizes)) + sizes
    pairs = zip(kept, sizes, strict=True)
    return data.expand([old if isinstance(new, int) and new == 1 else new for old, new in pairs])


def _tile(_node: Node, data: Value, repeats: Value) -> Value:
    counts = to_list(repeats)
    return data.repeat(counts) if isinstance(data, Tensor) else np.tile(data, counts)


def _constant_of_shape(node: Node, shape: Value) -> Value:
    value = node.get("value", np.zeros(1, np.float32))
    if np.issubdtype(value.dtype, np.floating):
        return torch.full(to_list(shape), value.item(), dtype=torch.from_numpy(value).dtype)
    return as_sizes(np.full(to_list(shape), value.item()))


def _range(_node: Node, start: Value, limit: Value, delta: Value) -> Value:
    first, end, step = (to_list(value)[0] for value in (start, limit, delta))
    if all(isinstance(number, int) for number in (first, end, step)):
        return make_sizes(list(range(first, end, step)))
    return torch.arange(first, end, step)


def _depth_to_space(node: Node, data: Tensor) -> Tensor:
    block = node.get("blocksize")
    batch, channels, height, width = data.shape
    depth = channels // block**2
    if node.get("mode", b"DCR") == b"CRD":
        parts = data.reshape(batch, depth, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    else:
        parts = data.reshape(batch, block, block, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, depth, height * block, width * block)


def _space_to_depth(node: Node, data: Tensor) -> Tensor:
    block = node.get("blocksize")
    batch, channels, height, width = data.shape
    parts = data.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(batch, channels * block**2, height // block, width // block)


def _identity(node: Node, data: Value, *_: Value | None) -> Value:
    if len([name for name in node.outputs if name]) > 1:
        raise NotImplementedError(f"{node.operator} with several outputs")
    return data


SHAPING: Final[Mapping[str, Operator]] = MappingProxyType(
    {
        "Concat": _concat,
        "ConstantOfShape": _constant_of_shape,
        "DepthToSpace": _depth_to_space,
        "Dropout": _identity,
        "Einsum": lambda node, *values: torch.einsum(node.get("equation").decode(), *values),
        "Expand": _expand,
        "Flatten": _flatten,
        "Gather": _gather,
        "GatherND": _gather_nd,
        "Identity": _identity,
        "Range": _range,
        "Reshape": _reshape,
        "ScatterND": _scatter_nd,
        "Shape": _shape,
        "Size": _size,
        "Slice": _slice,
        "SpaceToDepth": _space_to_depth,
        "Split": _split,
        "Squeeze": _squeeze,
        "Tile": _tile,
        "Transpose": _transpose,
        "Unsqueeze": _unsqueeze,
    }
)
