"""Model architectures: how to build a network for a number of classes and an image size."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec

Stem: TypeAlias = Literal["own", "small"]
Builder: TypeAlias = Callable[[int], nn.Module]
SizedBuilder: TypeAlias = Callable[[int, InputSpec], nn.Module]
Initialize: TypeAlias = Callable[[nn.Module, Tensor], None]

RESNET_PREFIXES = ("resnet", "resnext", "wide_resnet")
"""The prefixes of the names of torchvision's ResNets, for which a small stem is available."""

_SIZE_STEP = 32  # suggested sizes are multiples of this, because most networks halve the image five times


class Architecture(NamedTuple):
    """A network that can be built for any number of classes.

    Attributes:
        name: the name of the architecture.
        stem: "own", or "small" for a torchvision ResNet whose first layers keep the size of the images.
        input: the default input.
        builder: returns the module for a number of classes and an input. Use `build`, which also checks the size.
        initialize: called once before training with the module, which it changes in place, and the first training
            images as network inputs, float32 (N, 3, H, W), at most 5,000. None if there is nothing to initialize.
    """

    name: str
    stem: Stem
    input: InputSpec
    builder: SizedBuilder
    initialize: Initialize | None = None

    def build(self, classes: int, input: InputSpec | None = None) -> nn.Module:  # noqa: A002 - the name of the field
        """Return a new module in training mode, which maps (N, 3, height, width) to logits (N, classes).

        Args:
            classes: the number of classes.
            input: the input of the module. The default is the architecture's own.

        Raises:
            UsageError: the network does not support images of that size.
        """
        requested = input or self.input
        module = self.builder(classes, requested)
        # Tests check the default sizes. Any other size must not fail later, during training.
        if (requested.height, requested.width) != (self.input.height, self.input.width):
            self._check_size(module, requested)
        return module

    def _check_size(self, module: nn.Module, requested: InputSpec) -> None:
        if _supports_size(module, requested.height, requested.width):
            return
        smaller_side = min(requested.height, requested.width)
        sizes = range(_SIZE_STEP, min(self.input.height, self.input.width) + 1, _SIZE_STEP)
        smallest = next((size for size in sizes if size > smaller_side and _supports_size(module, size, size)), None)
        raise UsageError(
            f"{self.name} takes {format_size(self.input)} images, not {format_size(requested)}",
            "leave out --image-size" if smallest is None else f"use --image-size {smallest}, or leave it out",
        )


def no_small_stem_error(name: str) -> UsageError:
    """Return the error for a small stem of an architecture that has none."""
    return UsageError(f"{name} has no small stem", "leave out --stem; torchvision's ResNets have one")


def format_size(size: InputSpec) -> str:
    """Return the image size as text, height first: "32x32"."""
    return f"{size.height}x{size.width}"


def _supports_size(module: nn.Module, height: int, width: int) -> bool:
    """Return whether the module accepts images of that size.

    The forward pass runs on the meta device, which computes only shapes. The module is not changed.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta_state = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    images = torch.empty(2, 3, height, width, device="meta")
    try:
        with torch.no_grad():
            torch.func.functional_call(module, meta_state, (images,))
    except (RuntimeError, ValueError, IndexError, AssertionError):  # modules raise any of these for a wrong shape
        return False
    return True
