"""A training run as it goes: a bar on a terminal, plain lines elsewhere, a table row an epoch on both."""

import sys
import time
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cifarx.output.console import note
from cifarx_train.callbacks.base import Callback, EpochReport, RunInfo, StepReport

_REFRESH_S: Final = 0.1
_HEADING = f"{'epoch':>7} {'step':>8} {'train loss':>11} {'test loss':>10} {'accuracy':>9} {'images/s':>9}  checkpoint"


def training_progress() -> Callback:
    """The callback that suits where standard error goes."""
    return _Bar() if sys.stderr.isatty() else _Lines()


class _Lines(Callback):
    """One row an epoch; the training loss is that of its last batch."""

    def on_train_start(self, run: RunInfo) -> None:
        self._say(_describe(run))
        self._say(_HEADING)

    def on_epoch_end(self, report: EpochReport) -> None:
        self._say(
            f"{report.epoch + 1:>4}/{report.epochs:<2} {report.step:>8,} {report.train_loss:>11.4f} "
            f"{report.evaluation.loss:>10.4f} {report.evaluation.accuracy:>9.2%} {report.images_per_s:>9,.0f}  "
            f"{report.checkpoint}"
        )

    def _say(self, line: str) -> None:
        note(line)


class _Bar(_Lines):
    """The rows, with a live bar below them."""

    def __init__(self) -> None:
        self._progress = Progress(
            BarColumn(),
            TextColumn("step {task.completed:,}/{task.total:,}  loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task = TaskID(0)
        self._due = 0.0

    def on_train_start(self, run: RunInfo) -> None:
        super().on_train_start(run)
        self._task = self._progress.add_task("train", total=run.steps, completed=run.first_step, loss=float("nan"))
        self._progress.start()

    def on_step_end(self, step: int) -> None:
        if (now := time.monotonic()) >= self._due:  # a small network on a GPU makes thousands of steps a second
            self._due = now + _REFRESH_S
            self._progress.update(self._task, completed=step)

    def on_log(self, report: StepReport) -> None:
        self._progress.update(self._task, loss=report.loss)

    def on_train_end(self) -> None:
        self._progress.stop()

    def _say(self, line: str) -> None:
        self._progress.console.print(line, soft_wrap=True)


def _describe(run: RunInfo) -> str:
    parameters = sum(parameter.numel() for parameter in run.module.parameters())
    ranks = f" with {run.ranks} processes" if run.ranks > 1 else ""
    resumed = f", {run.first_step:,} of them done" if run.first_step else ""
    return (
        f"{run.model}, {parameters:,} parameters, recipe {run.recipe.name}, on {run.device}{ranks}: {run.data}, "
        f"{run.train_images:,} training and {len(run.test):,} test images, {run.steps:,} steps{resumed}"
    )
