"""Fastnet, a network for 32x32 images that trains in seconds.

It combines the ideas of the CIFAR-10 speed records: a fixed whitening layer at the start, three groups of two 3x3
convolutions that are initialized to the identity, BatchNorm without a scale, GELU, no residual connections, and scaled
logits. It has 1,971,352 trainable parameters for ten classes.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from cifarx_serve.spec import InputSpec
from cifarx_train.models.layers.whitening import Whitening
from cifarx_train.models.registry import register_model

_WIDTHS = (64, 256, 256)
# Training is so short that the running statistics would lag behind with PyTorch's default of 0.1.
_BATCHNORM_MOMENTUM = 0.4
_LOGIT_SCALE = 1 / 9  # from the speed records; with it, the head trains at the learning rate of the other layers


class Fastnet(nn.Module):
    """Maps images (N, 3, H, W) to logits (N, classes). Designed for 32x32 pixels; larger images work too."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.whitening = Whitening()
        self.activation = nn.GELU()
        channels = pairwise((Whitening.channels, *_WIDTHS))
        self.groups = nn.Sequential(*(_group(in_channels, out_channels) for in_channels, out_channels in channels))
        self.head = nn.Linear(_WIDTHS[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.groups(self.activation(self.whitening(images)))
        logits: Tensor = self.head(features.amax((2, 3))) * _LOGIT_SCALE
        return logits


def _group(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a group that maps (N, in_channels, H, W) to (N, out_channels, H / 2, W / 2)."""
    return nn.Sequential(
        _conv(in_channels, out_channels),
        nn.MaxPool2d(2),
        _batchnorm(out_channels),
        nn.GELU(),
        _conv(out_channels, out_channels),
        _batchnorm(out_channels),
        nn.GELU(),
    )


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3x3 convolution whose first `in_channels` filters are the identity and whose others are random."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:in_channels])
    return conv


def _batchnorm(channels: int) -> nn.BatchNorm2d:
    """Return a BatchNorm that trains only its bias, because the next layer makes a scale redundant."""
    batchnorm = nn.BatchNorm2d(channels, momentum=_BATCHNORM_MOMENTUM)
    batchnorm.weight.requires_grad_(False)  # stays at 1; without a weight, CUDA's fast kernels are not used
    return batchnorm


def _initialize_whitening(module: nn.Module, images: Tensor) -> None:
    assert isinstance(module, Fastnet)
    module.whitening.fit(images)


@register_model("fastnet", InputSpec(height=32, width=32), initialize=_initialize_whitening)
def fastnet(classes: int) -> nn.Module:
    return Fastnet(classes)
