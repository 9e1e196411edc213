"""TensorBoard's view of a run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

from cifarx_serve.errors import FallbackWarning
from cifarx_serve.files.atomic import cannot_write
from cifarx_train.callbacks.base import Callback, EpochReport, RunStart, StepReport
from cifarx_train.callbacks.tensorboard.confusion_matrix import MOST_CLASSES, confusion_picture
from cifarx_train.callbacks.tensorboard.event_writer import EventWriter, shown_summaries
from cifarx_train.callbacks.tensorboard.graph import network_graph
from cifarx_train.callbacks.tensorboard.mistakes import mistakes_picture
from cifarx_train.memory import peak_memory

_BY_EPOCH: Final = frozenset({"test_loss", "accuracy", "memory_mib", "checkpoint_s", "confusion", "mistakes"})


class TensorBoard(Callback):
    """The notes' scalars: `train_loss` by step; `test_loss` and `accuracy` by epoch; and more.

    By step also `learning_rate`, `gradient_norm` and `images_per_s`; by epoch `memory_mib`, `checkpoint_s` and the
    pictures `confusion` and `mistakes`; once the network's graph, and the recipe beside what it led to. Where the
    folder can no longer be written it says so once, and the run goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: EventWriter | None = None
        self._judged = False

    def on_start(self, run: RunStart) -> None:
        self._run = run
        with self._or_without():
            earlier = shown_summaries(self._folder) if run.first_step else []
            self._file = EventWriter(self._folder)
            self._go_on(self._file, earlier)
            if graph := network_graph(run.module, run.input):
                self._file.add(graph)

    def on_log(self, report: StepReport) -> None:
        values = {
            "train_loss": report.loss,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "images_per_s": report.images_per_s,
        }
        with self._or_without():
            if self._file:
                self._file.add_scalars(report.step, values)

    def on_epoch(self, report: EpochReport) -> None:
        with self._or_without():
            if self._file:
                self._add_epoch(self._file, report)

    def on_end(self) -> None:
        with self._or_without():
            if self._file:
                if self._judged:
                    self._file.add_summary(0, self._recipe()[-1])
                self._file.close()
                self._file = None

    def _drop(self) -> None:
        if self._file:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _go_on(self, file: EventWriter, earlier: list[Event]) -> None:
        """Hide what an earlier run in the folder told, but for what the continued run had told by its checkpoint.

        TensorBoard can only hide the points from some step on, of all curves alike, and an epoch's number is no step:
        so all are hidden, and those that still hold are told again.
        """
        kept = [event for event in earlier if self._holds(event)]
        if self._run.first_step and len(kept) == len(earlier):
            return
        file.hide_earlier()
        for event in kept:
            file.add(event)

    def _holds(self, event: Event) -> bool:
        """Whether what was told belongs to the steps that were done before this process."""
        run = self._run
        if any(value.tag in _BY_EPOCH for value in event.summary.value):
            return bool(event.step < run.first_step // (run.steps // run.recipe.epochs))
        return bool(event.step <= run.first_step)

    def _add_epoch(self, file: EventWriter, report: EpochReport) -> None:
        eval_model, names = report.evaluation, self._run.class_names
        values = {
            "test_loss": eval_model.loss,
            "accuracy": eval_model.accuracy,
            "memory_mib": peak_memory(torch.device(self._run.device)) / 2**20,
            "checkpoint_s": report.save_s,
        }
        file.add_scalars(report.epoch, values)
        if not self._judged:
            self._judged = True
            for summary in self._recipe()[:-1]:
                file.add_summary(0, summary)
        if len(names) <= MOST_CLASSES:
            file.add_picture(report.epoch, "confusion", confusion_picture(eval_model.confusion, names))
        file.add_picture(report.epoch, "mistakes", mistakes_picture(eval_model.mistakes, self._run.test, names))

    def _recipe(self) -> tuple[Summary, Summary, Summary]:
        """The recipe as hyperparameters; what it led to are the last points of the two curves."""
        fields = msgspec.to_builtins(self._run.recipe)
        fields["recipe"] = fields.pop("name")
        settings = {"model": self._run.model, "seed": self._run.seed, **fields}
        experiment, start, end = hparams(settings, {"accuracy": 0.0, "test_loss": 0.0})
        return experiment, start, end

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """The block, or no TensorBoard from here on: a full disk must not end a run that could go on."""
        try:
            yield
        except OSError as error:
            self._drop()
            problem = cannot_write(self._folder, error).problem
            warnings.warn(f"{problem}: the run goes on without TensorBoard", FallbackWarning, stacklevel=4)
