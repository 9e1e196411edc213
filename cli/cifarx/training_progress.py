"""A training run as it goes: a bar on a terminal, plain lines elsewhere, a table row an epoch on both."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cifarx.console import note
from cifarx_train.observers import EpochReport, Observer, RunStart

_HEADING = f"{'epoch':>7} {'step':>8} {'train loss':>11} {'test loss':>10} {'accuracy':>9} {'images/s':>9}  checkpoint"


def training_progress() -> Observer:
    """The observer that suits where standard error goes."""
    return _Bar() if sys.stderr.isatty() else _Lines()


class _Lines(Observer):
    """One row an epoch; the training loss is the last one read."""

    def __init__(self) -> None:
        self._loss = float("nan")

    def on_start(self, run: RunStart) -> None:
        self._say(_describe(run))
        self._say(_HEADING)

    def on_train_loss(self, step: int, loss: float) -> None:  # noqa: ARG002
        self._loss = loss

    def on_epoch(self, report: EpochReport) -> None:
        self._say(
            f"{report.epoch + 1:>4}/{report.epochs:<2} {report.step:>8,} {self._loss:>11.4f} {report.test_loss:>10.4f} "
            f"{report.test_accuracy:>9.2%} {report.images_per_s:>9,.0f}  {report.checkpoint}"
        )

    def _say(self, line: str) -> None:
        note(line)


class _Bar(_Lines):
    """The rows, with a live bar below them."""

    def __init__(self) -> None:
        super().__init__()
        self._progress = Progress(
            BarColumn(),
            TextColumn("step {task.completed:,}/{task.total:,}  loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task = TaskID(0)

    def on_start(self, run: RunStart) -> None:
        super().on_start(run)
        self._task = self._progress.add_task("train", total=run.steps, loss=float("nan"))
        self._progress.start()

    def on_step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def on_train_loss(self, step: int, loss: float) -> None:
        super().on_train_loss(step, loss)
        self._progress.update(self._task, loss=loss)

    def on_end(self) -> None:
        self._progress.stop()

    def _say(self, line: str) -> None:
        self._progress.console.print(line, soft_wrap=True)


def _describe(run: RunStart) -> str:
    return (
        f"{run.model}, {run.parameters:,} parameters, on {run.device}: {run.data}, {run.train_images:,} training and "
        f"{run.test_images:,} test images, {run.steps:,} steps"
    )
