"""The momentum of BatchNorm layers in short runs."""

from typing import Final

from torch import nn

_MAX_MOMENTUM: Final = 0.1  # PyTorch's default
_TIME_CONSTANTS: Final = 10.0  # after this many times 1 / momentum steps, the initial statistics have no influence


def raise_batchnorm_momentum(module: nn.Module, steps: int) -> None:
    """Raise the momentum of BatchNorm layers, in place, so that their running statistics converge within a run.

    Some networks of torchvision are configured for runs of several days. With MobileNetV3's momentum of 0.01, the
    running statistics average over hundreds of steps, so after a few epochs of a small dataset they are still close to
    their initial values, and the accuracy is that of guessing. A momentum is only raised as far as the run requires,
    and never above PyTorch's default of 0.1.

    Args:
        module: the network.
        steps: the number of training steps of the run.
    """
    required = min(_MAX_MOMENTUM, _TIME_CONSTANTS / steps)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, required)
