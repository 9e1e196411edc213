"""Lzh, the network of the original CIFAR-10 training notes: three convolutions, three max-pools, two linear layers.

It has no activation functions: max-pooling is its only nonlinearity. It has 145,578 parameters for ten classes.
"""

import torch
from torch import nn

from cifarx_serve.spec import InputSpec
from cifarx_train.models.registry import register_model


class Lzh(nn.Module):
    """Maps images (N, 3, 32, 32) with values in [0, 1] to logits (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        # A single Sequential named `model`, so that the keys are those of legacy checkpoints (`model.0.weight`, …).
        self.model = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, kernel_size=5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=5, padding=2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.Linear(64, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(images)
        return logits


@register_model("lzh", InputSpec(height=32, width=32))
def lzh(classes: int) -> nn.Module:
    return Lzh(classes)
