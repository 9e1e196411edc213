"""Who watches a run: the loop tells them what happened and knows nothing of how it is shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.tensorboard import SummaryWriter

LOG_EVERY = 100
"""Steps between two readings of the training loss: each one waits for the device."""


class RunStart(NamedTuple):
    """What is about to be trained, on what; `steps` of the whole run."""

    model: str
    parameters: int
    device: str
    data: str
    train_images: int
    test_images: int
    steps: int


class EpochReport(NamedTuple):
    """One epoch, judged. `images_per_s` is of training alone, without the evaluation and the checkpoint."""

    epoch: int
    epochs: int
    step: int
    test_loss: float
    test_accuracy: float
    images_per_s: float
    checkpoint: Path


class Observer:
    """Watches a run and does nothing; override what matters."""

    def on_start(self, run: RunStart) -> None:
        """Before the first step."""

    def on_step(self, step: int) -> None:
        """After step number `step`, from 1; must not touch the device."""

    def on_train_loss(self, step: int, loss: float) -> None:
        """Every `LOG_EVERY` steps: the loss of that step's batch."""

    def on_epoch(self, report: EpochReport) -> None:
        """After an epoch's checkpoint is safely on the disk."""

    def on_end(self) -> None:
        """When the run is over, also when it failed."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = members

    def on_start(self, run: RunStart) -> None:
        for member in self._members:
            member.on_start(run)

    def on_step(self, step: int) -> None:
        for member in self._members:
            member.on_step(step)

    def on_train_loss(self, step: int, loss: float) -> None:
        for member in self._members:
            member.on_train_loss(step, loss)

    def on_epoch(self, report: EpochReport) -> None:
        for member in self._members:
            member.on_epoch(report)

    def on_end(self) -> None:
        for member in self._members:
            member.on_end()


class TensorBoard(Observer):
    """The notes' scalars: `train_loss` by step; `test_loss` and `accuracy` by epoch."""

    def __init__(self, folder: Path) -> None:
        # purge_step: a new run in the same folder hides the curves of the old one instead of crossing them.
        self._writer = SummaryWriter(str(folder), purge_step=0)

    def on_train_loss(self, step: int, loss: float) -> None:
        self._writer.add_scalar("train_loss", loss, step)

    def on_epoch(self, report: EpochReport) -> None:
        self._writer.add_scalar("test_loss", report.test_loss, report.epoch)
        self._writer.add_scalar("accuracy", report.test_accuracy, report.epoch)
        self._writer.flush()

    def on_end(self) -> None:
        self._writer.close()
