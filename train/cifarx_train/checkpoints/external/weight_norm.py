"""Fold weight normalization into the weights, as `torch.nn.utils.remove_weight_norm` does."""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

_FORMS: Final = (
    (re.compile(r"(.*\.)?(\w+)_g"), "{0}{1}_v"),
    (re.compile(r"(.*\.)?parametrizations\.(\w+)\.original0"), "{0}parametrizations.{1}.original1"),
)
"""The keys of the magnitude of a weight and of its direction: those of `torch.nn.utils.weight_norm`, and those of its
successor in `torch.nn.utils.parametrizations`."""

_WHOLE: Final = -1
"""The axis of a magnitude that is one number, in PyTorch's notation."""


class Folded(NamedTuple):
    """Tensors without weight normalization, and how many of them were normalized."""

    tensors: dict[str, Tensor]
    normalized: int


class _Keys(NamedTuple):
    direction: str
    weight: str


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> Folded:
    """Replace each magnitude and direction by the weight: the direction, scaled to the magnitude.

    The magnitude has one value for each index of one axis, or one for the whole weight (Salimans and Kingma, 2016,
    arXiv:1602.07868). The result is float32 or float64.
    """
    magnitudes = {key: found for key in tensors if (found := _find(key, tensors)) is not None}
    directions = {keys.direction for keys in magnitudes.values()}
    folded: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in magnitudes:
            direction, weight = magnitudes[key]
            folded[weight] = _scale(tensors[direction], tensor)
        elif key not in directions:
            folded[key] = tensor
    return Folded(folded, len(magnitudes))


def has_weight_norm(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether any weight is normalized."""
    return any(_find(key, tensors) is not None for key in tensors)


def _find(key: str, tensors: Mapping[str, Tensor]) -> _Keys | None:
    """Return the other keys of a weight, if a key is that of its magnitude."""
    for magnitude, direction in _FORMS:
        if match := magnitude.fullmatch(key):
            owner, name = match.group(1) or "", match.group(2)
            other = direction.format(owner, name)
            if other in tensors and _axis(tensors[key], tensors[other]) is not None:
                return _Keys(other, f"{owner}{name}")
    return None


def _axis(magnitude: Tensor, direction: Tensor) -> int | None:
    """Return the axis that a magnitude belongs to, -1 for the whole weight, or None if the two do not fit."""
    if magnitude.ndim == 0:
        return _WHOLE
    if magnitude.ndim != direction.ndim:
        return None
    return next((axis for axis in range(direction.ndim) if list(magnitude.shape) == _norm_shape(direction, axis)), None)


def _norm_shape(direction: Tensor, axis: int) -> list[int]:
    """Return the shape of the norms of a tensor along all axes but one."""
    return [size if position == axis else 1 for position, size in enumerate(direction.shape)]


def _scale(direction: Tensor, magnitude: Tensor) -> Tensor:
    axis = _axis(magnitude, direction)
    assert axis is not None, "checked by _find"
    direction, magnitude = (each if each.dtype is torch.float64 else each.float() for each in (direction, magnitude))
    scaled: Tensor = torch._weight_norm(direction, magnitude, axis)  # as the layer does, to the same bits
    return scaled
