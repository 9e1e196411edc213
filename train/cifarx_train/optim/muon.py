"""The Muon optimizer, which orthogonalizes the update of every weight matrix.

From Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". `torch.optim.Muon` accepts only
two-dimensional weights. This version flattens the filters of convolutions and, as in the CIFAR-10 speed records, keeps
the norm of every weight constant.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.optim import Optimizer

# The coefficients of the quintic Newton-Schulz iteration from the paper: the slope at zero is as steep as possible
# while singular values stay near one.
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_ITERATIONS: Final = 3
_EPS: Final = 1e-7  # avoids division by the norm of weights that are all zero


class Muon(Optimizer):
    """SGD with momentum in which each update is replaced by the nearest orthogonal matrix.

    The norm of a weight is set to the square root of its number of filters in every step.

    Args:
        parameters: weights with at least two dimensions; the first dimension is the number of filters.
        lr: the learning rate.
        momentum: the momentum factor.
        nesterov: whether to use Nesterov momentum.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float, momentum: float, nesterov: bool) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. `closure` is not supported."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"]
        momentum.mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        weight.mul_(len(weight) ** 0.5 / weight.norm().clamp_min(_EPS))
        weight.sub_(orthogonalize(update.flatten(1)).view_as(weight) * group["lr"])


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return an approximation of the nearest orthogonal matrix: the singular values are near one.

    Uses Newton-Schulz iterations in bfloat16, the fastest matrix product on GPUs since Ampere, instead of a
    decomposition.

    Args:
        matrix: a matrix (rows, columns) of any floating-point dtype.

    Returns:
        A matrix of the same shape and dtype.
    """
    a, b, c = _COEFFICIENTS
    x: torch.Tensor = matrix.bfloat16()
    x = x / (x.norm() + _EPS)
    if transposed := len(x) > x.shape[1]:
        x = x.T
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if transposed else x).to(matrix.dtype)
