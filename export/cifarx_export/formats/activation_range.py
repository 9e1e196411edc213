"""Check that the activations of a network fit into a half-precision type: the largest float16 is 65,504.

The parity check of an ONNX file cannot find this: on a CPU, ONNX Runtime computes float16 in float32.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifarx_export.formats.half_types import FLOAT16, HalfType
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.parity.checks import Check

_MAX_IMAGES: Final = 1024

_CONSTANT_FILLS: Final = frozenset(
    f"aten::{name}" for name in ("fill_", "full", "full_like", "masked_fill", "masked_fill_", "scalar_tensor", "where")
)
"""Operators that write constants, such as the mask of an attention, which stands for infinity in any precision."""


def check_range(largest: Mapping[str, float], half: HalfType = FLOAT16) -> Check:
    """Check the largest absolute activation of each layer, by its name in the order of execution."""
    name = f"{half.name} range"
    beyond = {layer: value for layer, value in largest.items() if value > half.largest}
    if beyond:
        layer, value = next(iter(beyond.items()))
        found = f"{layer} reaches {value:.4g} and overflows on a GPU: the largest {half.name} is {half.largest:g}"
        return Check(name, False, found)
    layer, value = max(largest.items(), key=lambda item: item[1], default=("no layer", 0.0))
    return Check(name, True, f"activations reach {value:.4g} of {half.largest:g} in {layer}")


def check_module_range(source: ConversionSource) -> Check:
    """Run the network in float32 on test images, and check what every operation returns."""
    source.progress("fp16: measuring the range of the activations")
    module, recorder = source.build_module(), _ActivationRecorder()
    with torch.no_grad(), recorder.following(module), recorder:
        for batch in source.test_inputs(_MAX_IMAGES):
            module(torch.from_numpy(batch))
    return check_range(recorder.largest)


class _ActivationRecorder(TorchDispatchMode):
    """Records the largest finite absolute value that each operation of each module returns.

    Attributes:
        largest: the values, by the name of the module and the operation, in the order of execution.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: dict[str, float] = {}
        self._modules: list[str] = []

    @contextmanager
    def following(self, network: nn.Module) -> Iterator[None]:
        """Follow in a `with` block which module is running."""
        handles = []
        for name, module in network.named_modules():

            def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
                self._modules.append(name)

            def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
                self._modules.pop()

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        operator = str(getattr(func, "_schema", func)).partition("(")[0].partition(".")[0]
        if operator not in _CONSTANT_FILLS:
            values = [entry for entry in _tensors(result) if entry.is_floating_point() and entry.numel()]
            if values:
                self._record(operator.removeprefix("aten::").strip("_"), max(map(_largest_finite, values)))
        return result

    def _record(self, operator: str, value: float) -> None:
        module = self._modules[-1] if self._modules else ""
        layer = f"{module} ({operator})" if module else operator
        self.largest[layer] = max(value, self.largest.get(layer, 0.0))


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [entry for entry in result if isinstance(entry, Tensor)] if isinstance(result, tuple | list) else []


def _largest_finite(tensor: Tensor) -> float:
    low, high = (abs(float(bound)) for bound in torch.aminmax(tensor))
    if math.isfinite(low) and math.isfinite(high):
        return max(low, high)
    return float(torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0).abs().max())
