"""Fastnet, our own network for 32x32 images, made to be trained in seconds.

Its ideas are those of the CIFAR-10 speed records: a fixed whitening first layer, three groups of two 3x3
convolutions that start as the identity, BatchNorm without a scale, GELU, no residual connections, and a head whose
logits start small. 1,971,352 trained parameters for ten classes.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from cifarx_serve.spec import InputSpec
from cifarx_train.models.layers.whitening import Whitening
from cifarx_train.models.registry import register_model

_WIDTHS = (64, 256, 256)
# Running statistics move this far with every batch: training is so short that the usual 0.1 would lag behind it.
_NORM_MOMENTUM = 0.4
_LOGIT_SCALE = 1 / 9  # the records' factor: with it the head takes the rates of the other layers


class Fastnet(nn.Module):
    """Input (N, 3, H, W), output logits (N, classes); made for 32x32 pixels, works on larger ones."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.whitening = Whitening()
        self.activation = nn.GELU()
        widths = pairwise((Whitening.channels, *_WIDTHS))
        self.groups = nn.Sequential(*(_group(inputs, outputs) for inputs, outputs in widths))
        self.head = nn.Linear(_WIDTHS[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.groups(self.activation(self.whitening(images)))
        logits: Tensor = self.head(features.amax((2, 3))) * _LOGIT_SCALE
        return logits


def _group(inputs: int, outputs: int) -> nn.Sequential:
    """(N, inputs, H, W) to (N, outputs, H / 2, W / 2)."""
    return nn.Sequential(
        _convolution(inputs, outputs),
        nn.MaxPool2d(2),
        _norm(outputs),
        nn.GELU(),
        _convolution(outputs, outputs),
        _norm(outputs),
        nn.GELU(),
    )


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution whose first `inputs` outputs start as its inputs, the others as random as ever."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[:inputs])
    return convolution


def _norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm that trains only its offset: the next layer would undo a scale anyway."""
    norm = nn.BatchNorm2d(channels, momentum=_NORM_MOMENTUM)
    norm.weight.requires_grad_(False)  # stays 1; None instead would leave out the fast kernels of CUDA
    return norm


def _fit_whitening(module: nn.Module, images: Tensor) -> None:
    assert isinstance(module, Fastnet)
    module.whitening.fit(images)


@register_model("fastnet", InputSpec(height=32, width=32), initialize=_fit_whitening)
def fastnet(classes: int) -> nn.Module:
    return Fastnet(classes)
