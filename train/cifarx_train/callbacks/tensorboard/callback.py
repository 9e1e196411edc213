"""The callback that logs a run to TensorBoard."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams, text

from cifarx_serve.errors import FallbackWarning
from cifarx_serve.files.atomic import write_error
from cifarx_train.callbacks.base import Callback, EpochReport, FinalReport, RunInfo, StepReport
from cifarx_train.callbacks.tensorboard.class_table import class_table
from cifarx_train.callbacks.tensorboard.confusion_matrix import MAX_CLASSES, confusion_matrix_image
from cifarx_train.callbacks.tensorboard.event_writer import EventWriter, visible_events
from cifarx_train.callbacks.tensorboard.graph import model_graph
from cifarx_train.callbacks.tensorboard.mistakes import mistakes_image
from cifarx_train.classification_metrics import class_metrics
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.device_memory import peak_device_memory
from cifarx_train.evaluation import Evaluation

_EPOCH_TAGS: Final = frozenset(
    {"memory_mib", "checkpoint_s", "test_loss", "accuracy", "confusion", "mistakes", "classes/text_summary"}
    | {f"val_{name}" for name in ("loss", "accuracy", "confusion", "mistakes", "classes/text_summary")}
)
"""Tags whose step is the number of an epoch. All others are logged by training step."""


_FINAL_PREFIXES: Final = ("temperature", "calibration_error")
"""Starts of the tags that are logged once, at the end. With a val split, so is all of the test split."""


class TensorBoard(Callback):
    """Logs scalars, images, the model graph and the recipe of a run to TensorBoard.

    By step: `train_loss`, `learning_rate`, `gradient_norm` and `images_per_s`. By epoch: `memory_mib`, `checkpoint_s`,
    and of the test split `test_loss`, `accuracy`, the images `confusion` and `mistakes`, and the table `classes`. With
    a val split, these are `val_loss`, `val_accuracy`, `val_confusion` and so on, and the chosen epoch alone has
    `test_loss`, `test_accuracy`, `test_confusion` and so on. Once: the graph of the model, the recipe as
    hyperparameters, and, if the run is calibrated, `temperature`, `calibration_error` and `calibration_error_before`,
    measured on the test split. If the log directory becomes unwritable, a `FallbackWarning` is issued and training
    continues without TensorBoard.

    Args:
        directory: the log directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: EventWriter | None = None
        self._evaluated = False

    def on_train_start(self, run: RunInfo) -> None:
        self._run = run
        with self._disable_on_error():
            earlier = visible_events(self._directory) if run.first_step else []
            self._writer = EventWriter(self._directory)
            self._hide_stale_events(self._writer, earlier)
            if graph := model_graph(run.module, run.input):
                self._writer.add_event(graph)

    def on_log(self, report: StepReport) -> None:
        values = {
            "train_loss": report.loss,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.grad_norm,
            "images_per_s": report.images_per_s,
        }
        with self._disable_on_error():
            if self._writer:
                self._writer.add_scalars(report.step, values)

    def on_epoch_end(self, report: EpochReport) -> None:
        with self._disable_on_error():
            if self._writer:
                self._add_epoch(self._writer, report)

    def on_test_end(self, report: FinalReport) -> None:
        with self._disable_on_error():
            if self._writer:
                self._add_final(self._writer, report)

    def on_train_end(self) -> None:
        with self._disable_on_error():
            if self._writer:
                if self._evaluated:
                    self._writer.add_summary(0, self._hparams()[-1])
                self._writer.close()
                self._writer = None

    def _hide_stale_events(self, writer: EventWriter, earlier: list[Event]) -> None:
        """Hide the events of earlier runs in the directory, except those up to the checkpoint that this run resumes.

        TensorBoard can only hide the points of all tags from a step on, and epochs are not steps. So everything is
        hidden, and the events that are still valid are written again.
        """
        valid = [event for event in earlier if self._is_valid(event)]
        if self._run.first_step and len(valid) == len(earlier):
            return
        writer.hide_earlier_events()
        for event in valid:
            writer.add_event(event)

    def _is_valid(self, event: Event) -> bool:
        """Return whether an event belongs to the steps completed before the resume."""
        run, tags = self._run, [value.tag for value in event.summary.value]
        if any(tag.startswith(_FINAL_PREFIXES if run.val_set is None else (*_FINAL_PREFIXES, "test_")) for tag in tags):
            return False  # the end of this run logs them again
        if any(tag in _EPOCH_TAGS for tag in tags):
            return bool(event.step < run.first_step // (run.total_steps // run.recipe.epochs))
        return bool(event.step <= run.first_step)

    def _add_epoch(self, writer: EventWriter, report: EpochReport) -> None:
        values = {
            "memory_mib": peak_device_memory(torch.device(self._run.device)) / 2**20,
            "checkpoint_s": report.checkpoint_s,
        }
        writer.add_scalars(report.epoch, values)
        if not self._evaluated:
            self._evaluated = True
            for summary in self._hparams()[:-1]:
                writer.add_summary(0, summary)
        images, prefix = self._run.evaluated_set, "" if self._run.val_set is None else "val_"
        self._add_evaluation(writer, report.epoch, report.evaluation, images, prefix)

    def _add_final(self, writer: EventWriter, report: FinalReport) -> None:
        if self._run.val_set is not None:
            self._add_evaluation(writer, report.epoch, report.evaluation, self._run.test_set, "test_")
        if calibration := report.calibration:
            values = {
                "temperature": calibration.temperature,
                "calibration_error_before": calibration.ece_before,
                "calibration_error": calibration.ece_after,
            }
            writer.add_scalars(report.epoch, values)

    def _add_evaluation(
        self, writer: EventWriter, epoch: int, evaluation: Evaluation, images: LabeledImages, prefix: str
    ) -> None:
        """Log a result on a split. The prefix is empty for the test split of a run without a val split."""
        class_names = self._run.class_names
        values = {f"{prefix or 'test_'}loss": evaluation.loss, f"{prefix}accuracy": evaluation.accuracy}
        writer.add_scalars(epoch, values)
        if len(class_names) <= MAX_CLASSES:
            matrix = confusion_matrix_image(evaluation.confusion_matrix, class_names)
            writer.add_image(epoch, f"{prefix}confusion", matrix)
        writer.add_image(epoch, f"{prefix}mistakes", mistakes_image(evaluation.mistakes, images, class_names))
        table = class_table(class_metrics(evaluation.confusion_matrix, class_names))
        writer.add_summary(epoch, text(f"{prefix}classes", table))

    def _hparams(self) -> tuple[Summary, Summary, Summary]:
        """Return the recipe as hyperparameters. Their metrics are the last values of the tags they name."""
        fields = msgspec.to_builtins(self._run.recipe)
        fields["recipe"] = fields.pop("name")
        lists = {field: msgspec.json.encode(value).decode() for field, value in fields.items() if _is_container(value)}
        values = {"model": self._run.model, "seed": self._run.seed, **fields, **lists}
        metrics = ["accuracy", "test_loss"]
        if self._run.val_set is not None:
            metrics = ["test_accuracy", "test_loss", "val_accuracy", "val_loss"]
        experiment, start, end = hparams(values, dict.fromkeys(metrics, 0.0))
        return experiment, start, end

    @contextmanager
    def _disable_on_error(self) -> Iterator[None]:
        """Stop logging if the block raises OSError: a full disk must not end a run that could continue."""
        try:
            yield
        except OSError as error:
            self._close_quietly()
            problem = write_error(self._directory, error).problem
            warnings.warn(f"{problem}: training continues without TensorBoard", FallbackWarning, stacklevel=4)

    def _close_quietly(self) -> None:
        if self._writer:
            with suppress(OSError):
                self._writer.close()
            self._writer = None


def _is_container(value: object) -> bool:
    return isinstance(value, dict | list | tuple)  # which TensorBoard does not take as a hyperparameter
