"""Check that the activations of a network fit into a half-precision type: the largest float16 is 65,504.

The parity check of an ONNX file cannot find this: on a CPU, ONNX Runtime computes float16 in float32.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from cifarx_export.formats.half_types import FLOAT16, HalfType
from cifarx_export.formats.layer_dispatch import LayerDispatchMode, operator_name, tensors_of
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.formats.rounding_errors import describe_rounding
from cifarx_export.parity.checks import Check

_MAX_IMAGES: Final = 1024

_ROUNDING_IMAGES: Final = 2
"""Number of images to find the layer with the largest rounding errors: all of its activations are kept."""

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
    """Run the network in float32 on test images, and check what every operation returns.

    Whether the predictions stay the same is for the parity check, because PyTorch computes the file in float16 on a CPU
    too. It names no layer, so that the one with the largest rounding errors is named here.
    """
    source.progress("fp16: measuring the range of the activations")
    module, recorder = source.build_module(), _ActivationRecorder()
    images = torch.empty(0)
    with torch.no_grad(), recorder.following(module):
        for batch in source.test_inputs(_MAX_IMAGES):
            images = torch.from_numpy(batch)
            module(images)
    check = check_range(recorder.largest)
    if not check.passed:
        return check
    rounding = describe_rounding(source.build_module(), images[:_ROUNDING_IMAGES])
    return msgspec.structs.replace(check, found=f"{check.found}; {rounding}")


class _ActivationRecorder(LayerDispatchMode):
    """Records the largest finite absolute value that each operation of each module returns.

    Attributes:
        largest: the values, by the name of the module and the operation, in the order of execution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, float] = {}

    def observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        operator = operator_name(func)
        if operator not in _CONSTANT_FILLS:
            values = [entry for entry in tensors_of(result) if entry.is_floating_point() and entry.numel()]
            if values:
                layer = self.layer(operator)
                self.largest[layer] = max(*map(_largest_finite, values), self.largest.get(layer, 0.0))
        return result


def _largest_finite(tensor: Tensor) -> float:
    low, high = (abs(float(bound)) for bound in torch.aminmax(tensor))
    if math.isfinite(low) and math.isfinite(high):
        return max(low, high)
    return float(torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0).abs().max())
