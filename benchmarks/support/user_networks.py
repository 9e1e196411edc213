"""Networks of a user."""

import torch
from torch import Tensor, nn


class Tutorial(nn.Module):
    """The network of PyTorch's CIFAR-10 tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool, self.conv2 = nn.Conv2d(3, 6, 5), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        logits: Tensor = self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))
        return logits


class Rows(nn.Module):
    """Reads an image row by row with an LSTM."""

    def __init__(self, num_classes: int = 10, hidden: int = 48) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(96, hidden, batch_first=True), nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 1, 3).flatten(2)
        logits: Tensor = self.head(self.lstm(rows)[0][:, -1])
        return logits


class Attention(nn.Module):
    """A transformer encoder on patches of 8x8 pixels."""

    def __init__(self, num_classes: int = 10, width: int = 48) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        layer = nn.TransformerEncoderLayer(width, 4, 96, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
        return logits


class Heads(nn.Module):
    """Returns a dict: the logits, and an embedding that nobody deploys."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 32, 3, 2), nn.SiLU()
        )
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        embedding = self.body(x).mean((2, 3))
        return {"logits": self.head(embedding), "embedding": embedding}


def gray(num_classes: int = 10) -> nn.Module:
    """Takes grayscale."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2),
        nn.BatchNorm2d(16, eps=1e-3),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, num_classes),
    )
