from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifarx_train.observers import EpochReport, Observer, Observers, RunStart, TensorBoard

START = RunStart("lzh", 145_578, "cpu", "drawings", 60, 30, 8)


def report(epoch: int, loss: float, accuracy: float) -> EpochReport:
    return EpochReport(epoch, 2, 4 * (epoch + 1), loss, accuracy, 100.0, Path(f"lzh_{epoch}.pth"))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: step and value by tag."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Diary(Observer):
    """Writes down what it is told, under its name, in a list that others share."""

    def __init__(self, name: str, told: list[tuple[object, ...]]) -> None:
        self.name = name
        self.told = told

    def on_start(self, run: RunStart) -> None:
        self.told.append((self.name, "start", run))

    def on_step(self, step: int) -> None:
        self.told.append((self.name, "step", step))

    def on_train_loss(self, step: int, loss: float) -> None:
        self.told.append((self.name, "train_loss", step, loss))

    def on_epoch(self, report: EpochReport) -> None:
        self.told.append((self.name, "epoch", report))

    def on_end(self) -> None:
        self.told.append((self.name, "end"))


def test_several_observers_are_told_everything_in_turn() -> None:
    told: list[tuple[object, ...]] = []
    both = Observers([Diary("a", told), Diary("b", told)])
    first = report(0, 1.5, 0.5)
    both.on_start(START)
    both.on_step(1)
    both.on_train_loss(100, 0.25)
    both.on_epoch(first)
    both.on_end()
    expected = [("start", START), ("step", 1), ("train_loss", 100, 0.25), ("epoch", first), ("end",)]
    assert told == [(name, *event) for event in expected for name in "ab"]


def test_an_observer_need_not_care() -> None:
    careless = Observers([Observer()])
    careless.on_start(START)
    careless.on_step(1)
    careless.on_train_loss(1, 0.0)
    careless.on_epoch(report(0, 1.5, 0.5))
    careless.on_end()


def test_tensorboard_gets_the_scalars_of_the_notes(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "logs")
    board.on_start(START)
    board.on_train_loss(100, 2.25)
    board.on_epoch(report(0, 1.5, 0.5))
    board.on_train_loss(200, 1.75)
    board.on_epoch(report(1, 1.25, 0.625))
    board.on_end()
    assert curves(tmp_path / "logs") == {
        "train_loss": [(100, 2.25), (200, 1.75)],
        "test_loss": [(0, 1.5), (1, 1.25)],
        "accuracy": [(0, 0.5), (1, 0.625)],
    }


def test_an_epoch_can_be_seen_while_the_run_goes_on(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_epoch(report(0, 1.5, 0.5))
    seen = curves(tmp_path)
    board.on_end()
    assert seen["accuracy"] == [(0, 0.5)]


def test_a_later_run_hides_the_curves_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TensorBoard orders files by the second they were made in; two runs of a person are never that close.
    now = iter(range(1_700_000_000, 1_700_100_000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    for losses in ([4.0, 3.5, 3.0], [2.0, 1.5]):
        board = TensorBoard(tmp_path)
        for epoch, loss in enumerate(losses):
            board.on_train_loss(100 * (epoch + 1), loss)
            board.on_epoch(report(epoch, loss, 0.5))
        board.on_end()
    seen = curves(tmp_path)
    assert seen["train_loss"] == [(100, 2.0), (200, 1.5)]
    assert seen["test_loss"] == [(0, 2.0), (1, 1.5)]
