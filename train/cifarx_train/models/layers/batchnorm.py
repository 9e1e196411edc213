"""BatchNorm in short runs."""

from typing import Final

from torch import nn

_USUAL: Final = 0.1  # PyTorch's own momentum
_SETTLED: Final = 10.0  # a run of so many times 1 / momentum steps has forgotten where its statistics began


def settle_norms(module: nn.Module, steps: int) -> None:
    """Let running statistics settle within a run of so many steps.

    Some networks of torchvision keep them for a run of days: MobileNetV3's momentum of 0.01 remembers hundreds of
    steps, and after a few epochs of a small data set its statistics are still those it began with, and its accuracy
    that of guessing. Momenta are raised to what the run needs, and never above PyTorch's usual 0.1.
    """
    needed = min(_USUAL, _SETTLED / steps)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, needed)
