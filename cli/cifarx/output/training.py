"""Shows the progress of training, one table row per epoch and a progress bar on a terminal, and its results."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cifarx.output.console import note
from cifarx_serve.system.terminal import printable
from cifarx_train.binomial import CONFIDENCE, Interval, interval
from cifarx_train.callbacks.base import Callback, EpochReport, FinalReport, RunInfo, StepReport
from cifarx_train.class_balance import RARE, rare_classes
from cifarx_train.classification_metrics import ClassMetrics, class_metrics, macro_average, worst_first
from cifarx_train.evaluation import Evaluation

if TYPE_CHECKING:
    from cifarx_train.trainer import TrainResult

_REFRESH_S: Final = 0.1
_MAX_CLASSES: Final = 20
"""Of more classes, the table at the end shows the worst ones."""

_SHOWN_CLASSES: Final = 10
_NAME_WIDTH: Final = 24  # of a class in that table, in columns of a terminal
_SHORT_NAME_WIDTH: Final = 10  # of a class in the row of an epoch, which fits into 80 columns


def training_progress() -> Callback:
    """Return a callback that shows a progress bar if standard error is a terminal."""
    return _ProgressBar() if sys.stderr.isatty() else _EpochTable()


class _EpochTable(Callback):
    """Prints one row per epoch, and a row per class at the end. The training loss is the one of the last batch."""

    def __init__(self) -> None:
        self._class_names: tuple[str, ...] = ()

    def on_train_start(self, run: RunInfo) -> None:
        self._class_names = run.class_names
        self._print(_describe(run))
        if note_of_rare := _rare_classes_note(run):
            self._print(note_of_rare)
        loss = f"{run.evaluated_split} loss"
        self._print(
            f"{'epoch':>5} {'step':>7} {'train loss':>10} {loss:>9} {'accuracy':>8} {'images/s':>8}  "
            f"{'worst class F1':<{_SHORT_NAME_WIDTH + 5}} checkpoint"
        )

    def on_epoch_end(self, report: EpochReport) -> None:
        worst = worst_first(class_metrics(report.evaluation.confusion_matrix, self._class_names))
        worst_class = f"{_shorten(worst[0].name, _SHORT_NAME_WIDTH)} {worst[0].f1:.0%}"
        epoch = f"{report.epoch + 1}/{report.epochs}"
        self._print(
            f"{epoch:>5} {report.step:>7,} {report.train_loss:>10.4f} {report.evaluation.loss:>9.4f} "
            f"{report.evaluation.accuracy:>8.2%} {report.images_per_s:>8,.0f}  "
            f"{set_cell_size(worst_class, _SHORT_NAME_WIDTH + 5)} {report.checkpoint}"
        )

    def on_test_end(self, report: FinalReport) -> None:
        images = int(report.evaluation.confusion_matrix.sum())
        self._print(f"{report.checkpoint} on the {images:,} test images:")
        for line in class_table(class_metrics(report.evaluation.confusion_matrix, self._class_names)):
            self._print(line)
        if report.calibration:
            source = "val images" if report.calibration.source == "val" else "training images that were held out"
            self._print(
                f"calibrated on {report.calibration.images:,} {source}: temperature "
                f"{report.calibration.temperature:.4g}, expected calibration error on the test images "
                f"{report.calibration.ece_before:.2%} before, {report.calibration.ece_after:.2%} after"
            )

    def _print(self, line: str) -> None:
        note(line)


class _ProgressBar(_EpochTable):
    """Prints the rows, with a live progress bar below them."""

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


def class_table(metrics: Sequence[ClassMetrics]) -> list[str]:
    """Return the lines of a table of the metrics of all classes, or of the worst ones if there are many."""
    shown = metrics if len(metrics) <= _MAX_CLASSES else worst_first(metrics)[:_SHOWN_CLASSES]
    average = macro_average(metrics)
    rows = [
        *((each.name, each.precision, each.recall, each.f1, f"{each.support:,}") for each in shown),
        ("macro average", *average, f"{sum(each.support for each in metrics):,}"),
    ]
    names = [_shorten(row[0], _NAME_WIDTH) for row in rows]
    width = max(map(cell_len, names))
    lines = [f"{'class':<{width}} {'precision':>10} {'recall':>8} {'F1':>8} {'images':>8}"]
    lines += [
        f"{set_cell_size(name, width)} {_percent(precision):>10} {_percent(recall):>8} {_percent(f1):>8} {images:>8}"
        for name, (_, precision, recall, f1, images) in zip(names, rows, strict=True)
    ]
    if hidden := len(metrics) - len(shown):
        lines.insert(-1, f"and {hidden:,} classes with a higher F1, which --json and TensorBoard list")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _shorten(text: str, width: int) -> str:
    """Return text that takes at most a number of columns of a terminal."""
    text = printable(text)
    return text if cell_len(text) <= width else set_cell_size(text, width - 2) + ".."


def accuracy_text(evaluation: Evaluation) -> str:
    """Return the test accuracy with its confidence interval."""
    low, high = accuracy_interval(evaluation)
    return f"{evaluation.accuracy:.2%} test accuracy ({CONFIDENCE:.0%} confidence: {low:.2%} to {high:.2%})"


def accuracy_interval(evaluation: Evaluation) -> Interval:
    """Return the confidence interval of the accuracy for the number of images it was measured on."""
    matrix = evaluation.confusion_matrix
    return interval(int(matrix.trace()), int(matrix.sum()))


def training_json(trained: "TrainResult") -> dict[str, Any]:
    """Return the result of a run for `--json`."""
    final = trained.final
    metrics = class_metrics(final.evaluation.confusion_matrix, trained.class_names)
    return {
        "checkpoints": list(map(str, trained.checkpoints)),
        "test_accuracy": trained.test_accuracy,
        "images_per_s": trained.images_per_s,
        "epochs": trained.epochs,
        "device": trained.device,
        "tested_checkpoint": str(final.checkpoint),
        "test_accuracy_interval": accuracy_interval(final.evaluation),
        "val_accuracy": final.val_accuracy,
        "macro_average": macro_average(metrics)._asdict(),
        "worst_class": worst_first(metrics)[0].name,
        "classes": [each._asdict() for each in metrics],
        "calibration": final.calibration and final.calibration._asdict(),
    }


def _rare_classes_note(run: RunInfo) -> str | None:
    """Return a note about the rare classes of a run that does nothing about them."""
    rare = rare_classes(run.class_counts) if run.class_counts else []
    if not rare or run.recipe.class_weights is not None or run.recipe.sampler != "shuffle":
        return None
    shown = ", ".join(f"{run.class_names[label]} ({run.class_counts[label]:,} images)" for label in rare[:3])
    more = f" and {len(rare) - 3:,} more" if len(rare) > 3 else ""
    classes = "1 class is" if len(rare) == 1 else f"{len(rare):,} classes are"
    return (
        f"note: {classes} rare, {shown}{more}: less than {RARE:.0%} of an equal share, which accuracy hardly shows; "
        "try --class-weights auto or --sampler balanced"
    )


def _describe(run: RunInfo) -> str:
    """Return a line about the model, the data and the length of the run."""
    parameters = sum(parameter.numel() for parameter in run.module.parameters())
    processes = f" with {run.world_size} processes" if run.world_size > 1 else ""
    resumed = f", resuming from {run.resumed_from} at step {run.first_step:,}" if run.resumed_from else ""
    val = "" if run.val_set is None else f", {len(run.val_set):,} val"
    calibration = f", {run.num_calibration_images:,} calibration" if run.num_calibration_images else ""
    return (
        f"{run.model}, {parameters:,} parameters, recipe {run.recipe.name}, "
        f"{run.recipe.precision} on {run.device}{processes}: {run.data}, "
        f"{run.num_train_images:,} training{val}{calibration} and {len(run.test_set):,} test images, "
        f"{run.total_steps:,} steps{resumed}"
    )
