"""The values between the operators of an ONNX graph: tensors, and integers that are known without the images.

Sizes are kept as NumPy arrays of Python integers or of the symbolic integers of `torch.export`, so that the arithmetic
of shapes in the graph becomes that of the exported network and its batch size stays variable.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sizes: TypeAlias = NDArray[np.object_]
"""Integers or booleans: an array of Python objects."""

Value: TypeAlias = Tensor | Sizes


def make_sizes(numbers: Sequence[Any]) -> Sizes:
    """Return a vector of integers, which may be symbolic: NumPy must not look into them."""
    sizes = np.empty(len(numbers), np.object_)
    for position, number in enumerate(numbers):
        sizes[position] = number
    return sizes


def as_sizes(value: Any) -> Sizes:
    """Return an array of integers or booleans, or one such scalar, as `Sizes`."""
    if isinstance(value, np.ndarray):
        return value.astype(np.object_)
    scalar = np.empty((), np.object_)
    scalar[()] = value
    return scalar


def to_list(value: Value) -> list[Any]:
    """Return the integers of a vector or scalar.

    Raises:
        NotImplementedError: they depend on the images.
    """
    if isinstance(value, Tensor):
        raise NotImplementedError("a shape that depends on the values of the images")
    return list(value.reshape(-1).tolist())


def to_tensor(value: Value, dtype: torch.dtype | None = None) -> Tensor:
    """Return a value as a tensor, by default int64 or bool."""
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    return torch.tensor(value.tolist(), dtype=dtype)
