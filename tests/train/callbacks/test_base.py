from pathlib import Path

import numpy as np
import pytest
from torch import nn

from cifarx_serve.spec import InputSpec
from cifarx_train.callbacks.base import Callback, CallbackList, EpochReport, FinalReport, RunInfo, StepReport
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Evaluation
from cifarx_train.recipes import RECIPES


class RecordingCallback(Callback):
    """Appends its name and the events it receives to a shared list."""

    def __init__(self, name: str, events: list[tuple[object, ...]]) -> None:
        self.name = name
        self.events = events

    def on_train_start(self, run: RunInfo) -> None:
        self.events.append((self.name, "start", run))

    def on_step_end(self, step: int) -> None:
        self.events.append((self.name, "step", step))

    def on_log(self, report: StepReport) -> None:
        self.events.append((self.name, "log", report))

    def on_epoch_end(self, report: EpochReport) -> None:
        self.events.append((self.name, "epoch", report))

    def on_test_end(self, report: FinalReport) -> None:
        self.events.append((self.name, "test", report))

    def on_train_end(self) -> None:
        self.events.append((self.name, "end"))


@pytest.fixture
def start() -> RunInfo:
    images = LabeledImages(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int64))
    spec, recipe = InputSpec(height=32, width=32), RECIPES["notes"]
    return RunInfo("lzh", nn.Identity(), spec, recipe, 0, "cpu", 1, "drawings", ("a", "b"), 60, images, 8)


@pytest.fixture
def first_epoch() -> EpochReport:
    evaluation = Evaluation(1.5, 0.5, np.eye(2, dtype=np.int64), [])
    return EpochReport(0, 2, 4, 1.25, evaluation, 100.0, 0.5, Path("lzh_0.pth"))


LOG = StepReport(step=100, loss=0.25, learning_rate=0.01, grad_norm=2.0, images_per_s=1000.0)


def test_every_callback_receives_every_event_in_order(start: RunInfo, first_epoch: EpochReport) -> None:
    events: list[tuple[object, ...]] = []
    final = FinalReport(first_epoch.checkpoint, 0, first_epoch.evaluation)
    both = CallbackList([RecordingCallback("a", events), RecordingCallback("b", events)])
    both.on_train_start(start)
    both.on_step_end(1)
    both.on_log(LOG)
    both.on_epoch_end(first_epoch)
    both.on_test_end(final)
    both.on_train_end()
    # Compared by identity, because the contents of an event may not be comparable.
    expected = [("start", start), ("step", 1), ("log", LOG), ("epoch", first_epoch), ("test", final), ("end",)]
    assert [tuple(map(id, event[2:])) for event in events] == [
        tuple(map(id, event[1:])) for event in expected for _ in "ab"
    ]
    assert [event[:2] for event in events] == [(name, event[0]) for event in expected for name in "ab"]


def test_callbacks_ignore_events_by_default(start: RunInfo, first_epoch: EpochReport) -> None:
    callbacks = CallbackList([Callback()])
    callbacks.on_train_start(start)
    callbacks.on_step_end(1)
    callbacks.on_log(LOG)
    callbacks.on_epoch_end(first_epoch)
    callbacks.on_test_end(FinalReport(first_epoch.checkpoint, 0, first_epoch.evaluation))
    callbacks.on_train_end()


def test_epochs_are_evaluated_on_the_val_split_where_there_is_one(start: RunInfo) -> None:
    assert (start.evaluated_split, start.evaluated_set) == ("test", start.test_set)
    val = LabeledImages(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int64))
    chosen = start._replace(val_set=val)
    assert (chosen.evaluated_split, chosen.evaluated_set) == ("val", val)
