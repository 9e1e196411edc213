from pathlib import Path

import numpy as np
import pytest
from torch import nn

from cifarx_serve.spec import InputSpec
from cifarx_train.callbacks.base import Callback, CallbackList, EpochReport, RunStart, StepReport
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Evaluation
from cifarx_train.recipes import RECIPES


class Diary(Callback):
    """Writes down what it is told, under its name, in a list that others share."""

    def __init__(self, name: str, told: list[tuple[object, ...]]) -> None:
        self.name = name
        self.told = told

    def on_start(self, run: RunStart) -> None:
        self.told.append((self.name, "start", run))

    def on_step(self, step: int) -> None:
        self.told.append((self.name, "step", step))

    def on_log(self, report: StepReport) -> None:
        self.told.append((self.name, "log", report))

    def on_epoch(self, report: EpochReport) -> None:
        self.told.append((self.name, "epoch", report))

    def on_end(self) -> None:
        self.told.append((self.name, "end"))


@pytest.fixture
def start() -> RunStart:
    images = LabeledImages(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int64))
    spec, recipe = InputSpec(height=32, width=32), RECIPES["notes"]
    return RunStart("lzh", nn.Identity(), spec, recipe, 0, "cpu", 1, "drawings", ("a", "b"), 60, images, 8)


@pytest.fixture
def first_epoch() -> EpochReport:
    eval_model = Evaluation(1.5, 0.5, np.eye(2, dtype=np.int64), [])
    return EpochReport(0, 2, 4, 1.25, eval_model, 100.0, 0.5, Path("lzh_0.pth"))


LOG = StepReport(step=100, loss=0.25, learning_rate=0.01, gradient_norm=2.0, images_per_s=1000.0)


def test_several_observers_are_told_everything_in_turn(start: RunStart, first_epoch: EpochReport) -> None:
    told: list[tuple[object, ...]] = []
    both = CallbackList([Diary("a", told), Diary("b", told)])
    both.on_start(start)
    both.on_step(1)
    both.on_log(LOG)
    both.on_epoch(first_epoch)
    both.on_end()
    # By identity: what a run holds need not be comparable.
    expected = [("start", start), ("step", 1), ("log", LOG), ("epoch", first_epoch), ("end",)]
    assert [tuple(map(id, event[2:])) for event in told] == [
        tuple(map(id, event[1:])) for event in expected for _ in "ab"
    ]
    assert [event[:2] for event in told] == [(name, event[0]) for event in expected for name in "ab"]


def test_an_observer_need_not_care(start: RunStart, first_epoch: EpochReport) -> None:
    careless = CallbackList([Callback()])
    careless.on_start(start)
    careless.on_step(1)
    careless.on_log(LOG)
    careless.on_epoch(first_epoch)
    careless.on_end()
