"""Find the layer of a network that loses most to the rounding of float16, by running each operation a second time."""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cifarx_export.formats.half_types import FLOAT16
from cifarx_export.formats.layer_dispatch import LayerDispatchMode, operator_name, tensors_of

_KEEPS_PARAMETERS: Final = "batch_norm"
"""Operators with this in their name mix parameters in float32 with inputs in float16; see `convert_module_to_fp16`."""


def describe_rounding(module: nn.Module, images: Tensor) -> str:
    """Return where the rounding errors of float16 grow most, from the inputs of an operation to its output.

    Args:
        module: a network in float32, in eval mode, on the CPU.
        images: float32 images as it takes them.
    """
    runs = _RunsInHalf(images)
    with torch.no_grad(), runs.following(module):
        module(images)
    if runs.largest_growth <= 1:
        return "no layer stands out"
    return f"rounding errors grow most in {runs.described}"


class _RunsInHalf(LayerDispatchMode):
    """Runs every operation in float32, and again in float16 on the results of the operations before it in float16.

    Attributes:
        largest_growth: the largest quotient of the relative error of an output and that of the inputs.
        described: the layer, and these errors.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.largest_growth, self.described = 1.0, ""
        self._halves: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._remember(images, images.half())

    def observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        operator = operator_name(func)
        given = tree_map(lambda value: self._half(value, operator), (args, kwargs))
        before = [self._error(value) for value in _flat_tensors((args, kwargs))]
        result = func(*args, **kwargs)
        try:
            rounded = func(*given[0], **given[1])
        except RuntimeError:  # there is no kernel for float16: the artifact computes in float32 there
            rounded = tree_map(lambda value: value.half() if _is_float(value) else value, result)
        pairs = list(zip(tensors_of(result), tensors_of(rounded), strict=False))
        errors = [self._remember(*pair) for pair in pairs if _is_float(pair[0]) and pair[0].numel()]
        if errors:  # others than the first are statistics, such as means, which may be near zero
            self._compare(self.layer(operator), max([FLOAT16.rounding, *before]), errors[0])
        return result

    def _compare(self, layer: str, before: float, error: float) -> None:
        if error / before > self.largest_growth:
            self.largest_growth = error / before
            self.described = f"{layer}, from {before:.2%} to {error:.2%} of its values"

    def _half(self, value: Any, operator: str) -> Any:
        if not _is_float(value):
            return value
        if id(value) in self._halves:
            return self._halves[id(value)][1]
        return value if _KEEPS_PARAMETERS in operator else value.half()

    def _error(self, value: Tensor) -> float:
        return self._halves[id(value)][2] if id(value) in self._halves else 0.0

    def _remember(self, exact: Tensor, half: Tensor) -> float:
        """Keep a tensor with its float16, and return the L2 norm of the difference over that of the tensor."""
        expected = exact.detach().double()
        norm, error = float(expected.norm()), float((half.double() - expected).norm())
        relative = error / norm if norm and error < float("inf") else (0.0 if error == 0 else float("inf"))
        self._halves[id(exact)] = (exact, half, relative)  # the tensor is kept because its id must stay its own
        return relative


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _flat_tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, Tensor) else None, values)
    return found
