"""Muon, an optimizer that makes the update of a matrix nearly orthogonal.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". PyTorch's own takes two-dimensional
weights alone; convolutions need their filters flattened and, in the speed records, their norm held.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.optim import Optimizer

# Of the quintic iteration in the paper: the slope at zero is as steep as it can be while the values stay near one.
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_ITERATIONS: Final = 3
_LEAST_NORM: Final = 1e-7  # of weights that start at zero


class Muon(Optimizer):
    """SGD with momentum, each update replaced by its nearest orthogonal matrix, each weight kept at its first norm.

    Args:
        parameters: weights with at least two dimensions; the first one counts filters.
        lr: a step's size, of weights whose norm is the square root of their number of filters.
        momentum: the share of the old direction that is kept.
        nesterov: look ahead by the momentum.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float, momentum: float, nesterov: bool) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change every weight that has a gradient. A closure is not supported."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._change(weight, weight.grad, group)

    def _change(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"]
        momentum.mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        weight.mul_(len(weight) ** 0.5 / weight.norm().clamp_min(_LEAST_NORM))
        weight.sub_(orthogonal(update.flatten(1)).view_as(weight) * group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of a matrix (rows, columns), in its own dtype: singular values near one.

    Newton-Schulz iterations in bfloat16, which every GPU since Ampere multiplies fastest; they need no decomposition.
    """
    a, b, c = _COEFFICIENTS
    x: torch.Tensor = matrix.bfloat16()
    x = x / (x.norm() + _LEAST_NORM)
    if wide := len(x) > x.shape[1]:
        x = x.T
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if wide else x).to(matrix.dtype)
