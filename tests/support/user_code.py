"""Code of a user, as text for a file next to a test."""

from pathlib import Path
from typing import Final

NETWORKS: Final = '''
import torch
from torch import nn


class Net(nn.Module):
    """The network of PyTorch's CIFAR-10 tutorial."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.pool, self.conv2 = nn.Conv2d(3, 6, 5), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = x.view(-1, 400)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Mnist(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))


class Wide(nn.Module):
    def __init__(self, width, n_classes):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, n_classes)

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class Dict(Wide):
    def forward(self, x):
        return {"features": self.features(x), "logits": super().forward(x)}


class Pair(Wide):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.softmax(1)


class Features(Wide):
    def forward(self, x):
        return self.features(x), super().forward(x)


class Auxiliary(Wide):
    """Returns two tensors in training mode only."""

    def forward(self, x):
        logits = super().forward(x)
        return {"logits": logits, "auxiliary": logits} if self.training else logits


class Odd(nn.Module):
    def forward(self, x):
        return x.view(2, 12345)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.size = 1 / 0


def small(width=4, num_classes=10):
    return Wide(width, num_classes)


def fixed():
    return Wide(4, 7)


def text():
    return "a network"


class Nested:
    inner = small


net = Wide(4, 3)
number = 5
'''
"""Networks of several kinds. `Wide` and those derived from it support any size of the images."""


def write_networks(folder: Path) -> Path:
    """Write `NETWORKS` to `model.py` in a folder, and return the path."""
    path = folder / "model.py"
    path.write_text(NETWORKS)
    return path
