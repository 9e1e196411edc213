"""The loop of the training notes, written from its description, and the loop of cifarx with the same settings.

The notes use a DataLoader with batches of 64 over a dataset that converts one image at a time, SGD with a learning
rate of 0.01 and no momentum, and log the loss every 100 steps.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import ToTensor

from cifarx_serve.spec import InputSpec
from cifarx_train.callbacks.base import Callback
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.selection import select_loader
from cifarx_train.loop import TrainingLoop
from cifarx_train.recipes import Recipe


class SingleImages(Dataset[tuple[torch.Tensor, int]]):
    """Convert one image at a time with Pillow and ToTensor, like torchvision's CIFAR10."""

    def __init__(self, data: LabeledImages) -> None:
        self._data = data
        self._transform = ToTensor()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._data.images[index])), int(self._data.labels[index])


class NotesLoop:
    """The loop of the notes; `train(steps)` continues where the last call stopped, across epochs."""

    def __init__(self, module: nn.Module, data: LabeledImages, device: torch.device, logs: Path) -> None:
        self._module = module.to(device).train()
        self._device = device
        self._loss = nn.CrossEntropyLoss().to(device)
        self._optimizer = torch.optim.SGD(self._module.parameters(), lr=0.01)
        self._loader = DataLoader(SingleImages(data), batch_size=64, shuffle=True)
        self._writer = SummaryWriter(str(logs))
        self._step = 0
        self._endless = self._steps()

    def train(self, steps: int) -> None:
        for _ in islice(self._endless, steps):
            pass

    def _steps(self) -> Iterator[None]:
        while True:
            for images, labels in self._loader:
                inputs, targets = images.to(self._device), labels.to(self._device)
                loss = self._loss(self._module(inputs), targets)
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
                self._step += 1
                if self._step % 100 == 0:
                    self._writer.add_scalar("train_loss", loss.item(), self._step)
                yield


class OurLoop:
    """The training loop of cifarx; `train(steps)` continues where the last call stopped."""

    def __init__(
        self, module: nn.Module, data: LabeledImages, spec: InputSpec, recipe: Recipe, device: torch.device
    ) -> None:
        self._loop = TrainingLoop(module.to(device), select_loader(data, device), spec, recipe, device=device)

    def train(self, steps: int) -> None:
        last = self._loop.step + steps
        while self._loop.step < last:
            for _ in self._loop.train_epochs(Callback(), lambda: self._loop.step >= last):
                pass
