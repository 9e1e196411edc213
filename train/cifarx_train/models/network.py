"""What a network is before it is built."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models.sizes import check_size

Stem: TypeAlias = Literal["own", "small"]
Builder: TypeAlias = Callable[[int], nn.Module]
SizedBuilder: TypeAlias = Callable[[int, InputSpec], nn.Module]
Initialize: TypeAlias = Callable[[nn.Module, Tensor], None]

RESNETS = ("resnet", "resnext", "wide_resnet")
"""How the names begin of torchvision's networks that have a small stem."""


class Network(NamedTuple):
    """How to build a network, and what it takes.

    Attributes:
        name: as it was asked for.
        stem: "own", or "small" for a torchvision ResNet whose first layers keep the images' size.
        input: the input it takes unless told otherwise.
        builder: gives the module for a number of classes and an input; `build` also checks the size.
        initialize: None, or called once before training with the module and the first training images as network
            inputs, float32 (N, 3, H, W), at most 5,000; changes the module in place.
    """

    name: str
    stem: Stem
    input: InputSpec
    builder: SizedBuilder
    initialize: Initialize | None = None

    def build(self, classes: int, input: InputSpec | None = None) -> nn.Module:  # noqa: A002 - the field's name
        """A new module in training mode: (N, 3, height, width) in, logits (N, classes) out.

        Args:
            classes: how many logits.
            input: what it is to take; the network's own input when None.

        Raises:
            UsageError: the network does not work on images of that size.
        """
        wanted = input or self.input
        module = self.builder(classes, wanted)
        # The default sizes are known to work: tests hold that. Any other must not fail in the midst of training.
        if (wanted.height, wanted.width) != (self.input.height, self.input.width):
            check_size(self.name, module, wanted, self.input)
        return module


def no_small_stem(name: str) -> UsageError:
    """The error for a small stem where there is none."""
    return UsageError(f"{name} has no small stem", "leave out --stem; torchvision's ResNets have one")
