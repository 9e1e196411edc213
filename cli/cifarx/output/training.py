"""Shows the progress of training: one table row per epoch, with a progress bar on a terminal."""

import sys
import time
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cifarx.output.console import note
from cifarx_serve.system.terminal import printable
from cifarx_train.callbacks.base import Callback, EpochReport, RunInfo, StepReport

_REFRESH_S: Final = 0.1
_HEADING = f"{'epoch':>7} {'step':>8} {'train loss':>11} {'test loss':>10} {'accuracy':>9} {'images/s':>9}  checkpoint"


def training_progress() -> Callback:
    """Return a callback that shows a progress bar if standard error is a terminal."""
    return _ProgressBar() if sys.stderr.isatty() else _EpochTable()


class _EpochTable(Callback):
    """Prints one row per epoch. The training loss is the one of the last batch."""

    def on_train_start(self, run: RunInfo) -> None:
        self._print(_describe(run))
        self._print(_HEADING)

    def on_epoch_end(self, report: EpochReport) -> None:
        self._print(
            f"{report.epoch + 1:>4}/{report.epochs:<2} {report.step:>8,} {report.train_loss:>11.4f} "
            f"{report.evaluation.loss:>10.4f} {report.evaluation.accuracy:>9.2%} {report.images_per_s:>9,.0f}  "
            f"{report.checkpoint}"
        )

    def _print(self, line: str) -> None:
        note(line)


class _ProgressBar(_EpochTable):
    """Prints the rows, with a live progress bar below them."""

    def __init__(self) -> None:
        self._progress = Progress(
            BarColumn(),
            TextColumn("step {task.completed:,}/{task.total:,}  loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task = TaskID(0)
        self._next_refresh = 0.0

    def on_train_start(self, run: RunInfo) -> None:
        super().on_train_start(run)
        self._task = self._progress.add_task(
            "train", total=run.total_steps, completed=run.first_step, loss=float("nan")
        )
        self._progress.start()

    def on_step_end(self, step: int) -> None:
        if (now := time.monotonic()) >= self._next_refresh:  # a small network can make thousands of steps per second
            self._next_refresh = now + _REFRESH_S
            self._progress.update(self._task, completed=step)

    def on_log(self, report: StepReport) -> None:
        self._progress.update(self._task, loss=report.loss)

    def on_train_end(self) -> None:
        self._progress.stop()

    def _print(self, line: str) -> None:
        self._progress.console.print(printable(line), soft_wrap=True, markup=False)


def _describe(run: RunInfo) -> str:
    """Return a line about the model, the data and the length of the run."""
    parameters = sum(parameter.numel() for parameter in run.module.parameters())
    processes = f" with {run.world_size} processes" if run.world_size > 1 else ""
    resumed = f", resuming from {run.resumed_from} at step {run.first_step:,}" if run.resumed_from else ""
    return (
        f"{run.model}, {parameters:,} parameters, recipe {run.recipe.name}, "
        f"{run.recipe.precision} on {run.device}{processes}: {run.data}, "
        f"{run.num_train_images:,} training and {len(run.test_set):,} test images, {run.total_steps:,} steps{resumed}"
    )
