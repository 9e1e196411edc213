"""Operators that compute each element of their output from the elements at the same position."""

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the usual name
from onnx import TensorProto
from torch import Tensor

from cifarx_export.onnx_network.node import Node, Operator
from cifarx_export.onnx_network.values import Value, as_sizes, to_tensor

_DTYPES: Final = MappingProxyType(
    {
        TensorProto.FLOAT: torch.float32,
        TensorProto.DOUBLE: torch.float64,
        TensorProto.FLOAT16: torch.float16,
        TensorProto.BFLOAT16: torch.bfloat16,
        TensorProto.INT64: torch.int64,
        TensorProto.INT32: torch.int32,
        TensorProto.UINT8: torch.uint8,
        TensorProto.INT8: torch.int8,
        TensorProto.BOOL: torch.bool,
    }
)

_Compute = Callable[..., Any]


def _on_tensors(function: _Compute) -> Operator:
    return lambda _node, *values: function(*map(to_tensor, values))


def _on_any(function: _Compute, on_sizes: _Compute) -> Operator:
    """Return an operator with one implementation for tensors and one for sizes."""

    def compute(_node: Node, *values: Value) -> Value:
        if any(isinstance(value, Tensor) for value in values):
            result: Value = function(*map(to_tensor, values))
            return result
        return as_sizes(on_sizes(*values))

    return compute


def _divide(dividend: Tensor, divisor: Tensor) -> Tensor:
    """Divide. Integers are rounded toward zero."""
    if dividend.is_floating_point():
        return dividend / divisor
    return torch.div(dividend, divisor, rounding_mode="trunc")


def _divide_sizes(dividend: Any, divisor: Any) -> Any:
    return dividend // divisor  # sizes are not negative


def _repeated(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return an operator that takes any number of inputs."""
    return _on_tensors(lambda *values: reduce(function, values))


def _mean(*values: Tensor) -> Tensor:
    return reduce(torch.add, values) / len(values)


def _clip(node: Node, data: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least, most = node.get("min", low), node.get("max", high)
    return data if least is None and most is None else torch.clamp(data, least, most)


def _cast(node: Node, data: Value, _like: Value | None = None) -> Value:
    dtype = _DTYPES.get(node.get("to"))
    if dtype is None:
        raise NotImplementedError(f"Cast to data type {node.get('to')}")
    if isinstance(data, Tensor) or dtype.is_floating_point:
        return to_tensor(data, dtype)
    return as_sizes(data.astype(np.bool_)) if dtype is torch.bool else data


def _gelu(node: Node, data: Tensor) -> Tensor:
    return F.gelu(data, approximate=node.get("approximate", b"none").decode())


def _hard_sigmoid(node: Node, data: Tensor) -> Tensor:
    return torch.clamp(node.get("alpha", 0.2) * data + node.get("beta", 0.5), 0, 1)


def _hard_swish(_node: Node, data: Tensor) -> Tensor:
    return F.hardswish(data)


def _remainder(node: Node, dividend: Value, divisor: Value) -> Value:
    if not isinstance(dividend, Tensor) and not isinstance(divisor, Tensor):
        return as_sizes(dividend % divisor)
    function = torch.fmod if node.get("fmod", 0) else torch.remainder
    return function(to_tensor(dividend), to_tensor(divisor))


def _prelu(_node: Node, data: Tensor, slope: Tensor) -> Tensor:
    return torch.where(data < 0, slope * data, data)


def _celu(node: Node, data: Tensor) -> Tensor:
    return F.celu(data, node.get("alpha", 1.0))


def _elu(node: Node, data: Tensor) -> Tensor:
    return F.elu(data, node.get("alpha", 1.0))


def _leaky_relu(node: Node, data: Tensor) -> Tensor:
    return F.leaky_relu(data, node.get("alpha", 0.01))


def _selu(node: Node, data: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return torch.where(data > 0, gamma * data, gamma * alpha * torch.expm1(data))


def _thresholded_relu(node: Node, data: Tensor) -> Tensor:
    return torch.where(data > node.get("alpha", 1.0), data, torch.zeros_like(data))


def _where(_node: Node, condition: Value, chosen: Value, other: Value) -> Value:
    if any(isinstance(value, Tensor) for value in (condition, chosen, other)):
        return torch.where(to_tensor(condition), to_tensor(chosen), to_tensor(other))
    assert not isinstance(condition, Tensor)
    return as_sizes(np.where(condition.astype(np.bool_), chosen, other))


_ON_TENSORS: Final[Mapping[str, _Compute]] = MappingProxyType(
    {
        "Abs": torch.abs,
        "Ceil": torch.ceil,
        "Cos": torch.cos,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Floor": torch.floor,
        "Log": torch.log,
        "Mean": _mean,
        "Mish": F.mish,
        "Pow": torch.pow,
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Round": torch.round,
        "Sigmoid": torch.sigmoid,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "Sqrt": torch.sqrt,
        "Tanh": torch.tanh,
    }
)
"""Operators without attributes that have the same meaning in PyTorch."""

ELEMENTWISE: Final[Mapping[str, Operator]] = MappingProxyType(
    {
        **{name: _on_tensors(function) for name, function in _ON_TENSORS.items()},
        "Add": _on_any(torch.add, operator.add),
        "And": _on_any(torch.logical_and, np.logical_and),
        "Cast": _cast,
        "Celu": _celu,
        "Clip": _clip,
        "Div": _on_any(_divide, _divide_sizes),
        "Elu": _elu,
        "Equal": _on_any(torch.eq, operator.eq),
        "Gelu": _gelu,
        "Greater": _on_any(torch.gt, operator.gt),
        "GreaterOrEqual": _on_any(torch.ge, operator.ge),
        "HardSigmoid": _hard_sigmoid,
        "HardSwish": _hard_swish,
        "LeakyRelu": _leaky_relu,
        "Less": _on_any(torch.lt, operator.lt),
        "LessOrEqual": _on_any(torch.le, operator.le),
        "Max": _repeated(torch.maximum),
        "Min": _repeated(torch.minimum),
        "Mod": _remainder,
        "Mul": _on_any(torch.mul, operator.mul),
        "Neg": _on_any(torch.neg, operator.neg),
        "Not": _on_any(torch.logical_not, np.logical_not),
        "Or": _on_any(torch.logical_or, np.logical_or),
        "PRelu": _prelu,
        "Selu": _selu,
        "Sub": _on_any(torch.sub, operator.sub),
        "Sum": _repeated(torch.add),
        "ThresholdedRelu": _thresholded_relu,
        "Where": _where,
    }
)
