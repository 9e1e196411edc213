"""Whether a network works on images of some size, found out before training starts."""

import torch
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec

_STEP = 32  # sizes to propose are multiples of this: most networks halve the image five times


def check_size(name: str, module: nn.Module, wanted: InputSpec, default: InputSpec) -> None:
    """Refuse a size that `module` does not work on.

    Args:
        name: the network, for the error.
        module: the network, built for `wanted`; left as it is.
        wanted: the input that was asked for.
        default: the input the network takes unless told otherwise, which it works on.

    Raises:
        UsageError: it does not work on it; the remedy is a size that works.
    """
    if _works(module, wanted.height, wanted.width):
        return
    larger = range(_STEP, min(default.height, default.width) + 1, _STEP)
    tried = (side for side in larger if side > min(wanted.height, wanted.width) and _works(module, side, side))
    smallest = next(tried, None)
    raise UsageError(
        f"{name} takes {size_text(default)} images, not {size_text(wanted)}",
        "leave out --image-size" if smallest is None else f"use --image-size {smallest}, or leave it out",
    )


def size_text(size: InputSpec) -> str:
    """The size as people write it: "32x32", height first."""
    return f"{size.height}x{size.width}"


def _works(module: nn.Module, height: int, width: int) -> bool:
    """Whether two images of that size pass through; on the meta device, which computes shapes and no numbers."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weightless = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    images = torch.empty(2, 3, height, width, device="meta")
    try:
        with torch.no_grad():
            torch.func.functional_call(module, weightless, (images,))
    except (RuntimeError, ValueError, IndexError, AssertionError):  # PyTorch has no one error for wrong shapes
        return False
    return True
