"""Networks that need contiguous activations, because they reshape them with `Tensor.view`."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from cifarx_serve.spec import InputSpec


def supports_channels_last(module: nn.Module, size: InputSpec) -> bool:
    """Return whether a module runs with an input in channels-last memory format. The module is not changed.

    Args:
        module: the module, which runs with a contiguous input.
        size: the input.
    """
    if size.layout != "NCHW":
        return False
    device = next(module.parameters(), torch.empty(0)).device
    images = torch.zeros(2, *size.shape, device=device).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            deepcopy(module).eval()(images)
    except RuntimeError:
        return False
    return True


def make_input_contiguous(module: nn.Module) -> None:
    """Make a module convert its input to the contiguous memory format, whatever format it is given."""
    module.register_forward_pre_hook(_make_contiguous)


def _make_contiguous(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)
