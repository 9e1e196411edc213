"""A small convolutional network with batch normalization: as fast as Lzh on a CPU, and a better classifier."""

from typing import Final

import torch
from torch import nn

_LAYERS: Final = ((3, 48, 4, 2), (48, 64, 3, 2), (64, 128, 3, 1), (128, 128, 3, 2), (128, 256, 3, 1))
"""The channels before and after each convolution, its size and its stride."""


class SmallNet(nn.Module):
    """Maps images (N, 3, 32, 32) to logits (N, classes). It has 0.6 million parameters for ten classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(
                layer
                for before, after, size, stride in _LAYERS
                for layer in (
                    nn.Conv2d(before, after, size, stride, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
            )
        )
        self.head = nn.Linear(256, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(images).mean((2, 3)))
        return logits
