"""The training loop."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.errors import CheckFailed
from cifarx_train.data.on_device import DeviceImages
from cifarx_train.observers import LOG_EVERY, Observer
from cifarx_train.recipes import Recipe


class EpochEnd(NamedTuple):
    """An epoch trained, not yet judged: its number from 0, the steps done so far, and the speed of it."""

    epoch: int
    step: int
    images_per_s: float


class Loop:
    """SGD over a data set, an epoch at a time.

    Attributes:
        optimizer: the optimizer, for the checkpoint.
        shuffle: the generator of each epoch's order, for the checkpoint.
    """

    def __init__(self, model: nn.Module, data: DeviceImages, recipe: Recipe, seed: int) -> None:
        self.model = model
        self.data = data
        self.recipe = recipe
        self.optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate)
        self.shuffle = torch.Generator().manual_seed(seed)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.epochs * math.ceil(len(self.data) / self.recipe.batch_size)

    def epochs(self, observer: Observer) -> Iterator[EpochEnd]:
        """Train, and stop after each epoch to let it be judged and saved.

        Raises:
            CheckFailed: the loss is no longer a finite number.
        """
        step = 0
        for epoch in range(self.recipe.epochs):
            self.model.train()
            started = time.perf_counter()
            order = torch.randperm(len(self.data), generator=self.shuffle)
            for inputs, labels in self.data.batches(self.recipe.batch_size, order):
                loss = functional.cross_entropy(self.model(inputs), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                step += 1
                observer.on_step(step)
                if step % LOG_EVERY == 0:  # .item() makes the host wait for the device
                    observer.on_train_loss(step, require_finite(loss.item(), step))
            require_finite(loss.item(), step)
            yield EpochEnd(epoch, step, len(self.data) / (time.perf_counter() - started))


def require_finite(loss: float, step: int) -> float:
    """The loss itself; raises CheckFailed where it is no longer a finite number."""
    if not math.isfinite(loss):
        raise CheckFailed(
            f"training diverged: the loss is {loss} at step {step}",
            "use a lower --lr; the checkpoints of earlier epochs are good",
        )
    return loss
