"""Who watches a run: the loop tells them what happened and knows nothing of how it is shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Evaluation
from cifarx_train.recipes import Recipe

LOG_EVERY = 100
"""Steps between two readings of the training loss: each one waits for the device."""


class RunStart(NamedTuple):
    """What is about to be trained, on what.

    Attributes:
        module: the network; for looking at, not for changing.
        steps: of the whole run; `first_step` of them were done before, by the run that this one continues.
        ranks: processes that train together.
    """

    model: str
    module: nn.Module
    input: InputSpec
    recipe: Recipe
    seed: int
    device: str
    ranks: int
    data: str
    class_names: tuple[str, ...]
    train_images: int
    test: LabeledImages
    steps: int
    first_step: int = 0


class StepReport(NamedTuple):
    """One step: the loss of its batch, the learning rate, the norm of the gradient before it was clipped.

    `images_per_s` is over the steps since the report before.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    images_per_s: float


class EpochReport(NamedTuple):
    """One epoch, eval_model and saved; `train_loss` is that of its last batch.

    `images_per_s` is of training alone, without the evaluation and the checkpoint; `save_s` are the seconds that the
    checkpoint took.
    """

    epoch: int
    epochs: int
    step: int
    train_loss: float
    evaluation: Evaluation
    images_per_s: float
    save_s: float
    checkpoint: Path


class Callback:
    """Watches a run and does nothing; override what matters."""

    def on_start(self, run: RunStart) -> None:
        """Before the first step."""

    def on_step(self, step: int) -> None:
        """After step number `step`, from 1; must not touch the device."""

    def on_log(self, report: StepReport) -> None:
        """Every `LOG_EVERY` steps."""

    def on_epoch(self, report: EpochReport) -> None:
        """After an epoch's checkpoint is safely on the disk."""

    def on_end(self) -> None:
        """When the run is over, also when it failed."""


class CallbackList(Callback):
    """Several callbacks as one."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self._members = members

    def on_start(self, run: RunStart) -> None:
        for member in self._members:
            member.on_start(run)

    def on_step(self, step: int) -> None:
        for member in self._members:
            member.on_step(step)

    def on_log(self, report: StepReport) -> None:
        for member in self._members:
            member.on_log(report)

    def on_epoch(self, report: EpochReport) -> None:
        for member in self._members:
            member.on_epoch(report)

    def on_end(self) -> None:
        for member in self._members:
            member.on_end()
