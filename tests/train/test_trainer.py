import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cifarx_serve.errors import CifarxError, FallbackWarning, Interrupted, ModelFileError, UsageError
from cifarx_serve.spec import InputSpec, TrainingRecord
from cifarx_train.callbacks.base import Callback, EpochReport, RunInfo
from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.selection import select_dataset
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluator
from cifarx_train.train import train
from cifarx_train.trainer import TrainResult
from tests.support.image_datasets import write_image_folder

# The complete run that other runs are compared with: three epochs of four steps.
RECIPE: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 0.05,
    "momentum": 0.5,
    "flip": True,
    "crop": 2,
}


class RecordingCallback(Callback):
    """Records the events it receives, and optionally sends a signal to the process after a step."""

    def __init__(self, signal_after: int | None = None, number: int = signal.SIGTERM) -> None:
        self.runs: list[RunInfo] = []
        self.reports: list[EpochReport] = []
        self.steps: list[int] = []
        self.ended = 0
        self.signal_after, self.number = signal_after, number

    def on_train_start(self, run: RunInfo) -> None:
        self.runs.append(run)

    def on_step_end(self, step: int) -> None:
        self.steps.append(step)
        if step == self.signal_after:
            signal.raise_signal(self.number)

    def on_epoch_end(self, report: EpochReport) -> None:
        self.reports.append(report)

    def on_train_end(self) -> None:
        self.ended += 1


def run(data: Path, out: Path, model: str = "lzh", **options: Any) -> TrainResult:
    return train(model, data=str(data), out=out, device="cpu", **{**RECIPE, **options})


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def record_of(path: Path) -> TrainingRecord:
    record = load_checkpoint(path).spec.training
    assert record is not None
    return record


def equal_weights(one: Path, other: Path) -> bool:
    first, second = load_checkpoint(one).weights, load_checkpoint(other).weights
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(color_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("whole")
    run(color_folder, folder)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of that directory, including the modification times of its files."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


# --- stopping before the last epoch


def test_patience_stops_a_run_that_does_not_improve(color_folder: Path, tmp_path: Path) -> None:
    callback = RecordingCallback()
    done = run(color_folder, tmp_path, epochs=9, learning_rate=1e-12, momentum=0, patience=2, callbacks=[callback])
    assert checkpoint_names(tmp_path) == ["lzh_0.pth", "lzh_1.pth", "lzh_2.pth"]
    assert done.epochs == 3
    # The epoch is counted from 1, as in the progress output.
    assert done.stop_reason == "test accuracy has not improved since epoch 1 (patience 2)"
    assert done.best == (tmp_path / "lzh_0.pth", done.test_accuracy)
    assert callback.ended == 1


def test_patience_does_not_stop_a_run_that_improves(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, epochs=3, patience=3)
    assert (done.epochs, done.stop_reason) == (3, None)


def test_a_resumed_run_without_patience_left_does_not_train(color_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 9, "learning_rate": 1e-12, "momentum": 0, "patience": 1}
    first = run(color_folder, tmp_path, **options)
    assert first.epochs == 2
    callback = RecordingCallback()
    again = run(color_folder, tmp_path, **options, resume="auto", callbacks=[callback])
    assert callback.steps == []
    assert again.stop_reason == "test accuracy has not improved since epoch 1 (patience 1)"
    assert again.checkpoints == [tmp_path / "lzh_1.pth"]
    assert (again.epochs, again.test_accuracy) == (2, first.test_accuracy)
    longer = run(color_folder, tmp_path, **{**options, "patience": 3}, resume="auto")
    assert longer.epochs == 4


def evaluate_checkpoint(path: Path, data: Path) -> float:
    spec = InputSpec(height=32, width=32)
    test = select_dataset(str(data)).load("test", spec)
    cpu = torch.device("cpu")
    evaluator = Evaluator(DeviceLoader(test, cpu), spec, 3, cpu, Distributed())
    return evaluator.evaluate(load_checkpoint(path).build()).accuracy


def test_a_run_at_its_time_limit_is_evaluated_and_saved_and_can_resume(
    color_folder: Path, whole: Path, tmp_path: Path
) -> None:
    callback = RecordingCallback()
    done = run(color_folder, tmp_path, max_minutes=1e-9, callbacks=[callback])
    assert callback.steps == [1]
    assert checkpoint_names(tmp_path) == ["lzh_interrupted.pth"]
    assert done.checkpoints == [tmp_path / "lzh_interrupted.pth"]
    assert done.epochs == 0
    assert done.stop_reason == "time limit reached (1e-09 min)"
    record = record_of(done.checkpoints[0])
    assert (record.epochs, record.test_accuracy) == (0, done.test_accuracy)
    assert done.test_accuracy == evaluate_checkpoint(done.checkpoints[0], color_folder)
    assert callback.reports[0].checkpoint == done.checkpoints[0]
    again = run(color_folder, tmp_path, max_minutes=100, resume="auto")
    assert (again.epochs, again.stop_reason) == (3, None)
    assert again.checkpoints == [tmp_path / f"lzh_{epoch}.pth" for epoch in range(3)]
    assert checkpoint_names(tmp_path) == ["lzh_0.pth", "lzh_1.pth", "lzh_2.pth"]
    assert all(equal_weights(path, whole / path.name) for path in again.checkpoints)


def test_a_run_without_a_complete_epoch_has_no_best_checkpoint(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, max_minutes=1e-9)
    assert done.best is None
    assert [path.name for path in done.checkpoints] == ["lzh_interrupted.pth"]


def test_the_time_limit_at_the_end_of_an_epoch(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, batch_size=60, max_minutes=1e-9)
    assert (done.epochs, checkpoint_names(tmp_path)) == (1, ["lzh_0.pth"])
    assert done.stop_reason == "time limit reached (1e-09 min)"


def test_the_time_limit_after_the_last_epoch_does_not_stop_a_run(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, epochs=1, batch_size=60, max_minutes=1e-9)
    assert (done.epochs, done.stop_reason) == (1, None)


def test_the_time_before_a_resume_counts(color_folder: Path, tmp_path: Path) -> None:
    run(color_folder, tmp_path, max_minutes=1e-9)
    callback = RecordingCallback()
    run(color_folder, tmp_path, max_minutes=1e-9, resume="auto", callbacks=[callback])
    assert callback.steps == [2]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 6])
def test_a_signal_stops_after_the_step_and_saves_the_state(
    step: int, number: int, color_folder: Path, whole: Path, tmp_path: Path
) -> None:
    previous, callback = signal.getsignal(number), RecordingCallback(step, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(
        Interrupted, match=rf"step {step} of 12, checkpoint saved to .*lzh_interrupted\.pth.*--resume"
    ) as caught:
        run(color_folder, tmp_path, callbacks=[callback])
    assert caught.value.exit_status == 128 + number
    assert callback.steps == list(range(1, step + 1))
    assert callback.ended == 1
    signal.signal(signal.SIGINT, previous if number == signal.SIGINT else signal.getsignal(signal.SIGINT))
    assert signal.getsignal(number) == previous
    assert checkpoint_names(tmp_path) == [*(["lzh_0.pth"] if step > 4 else []), "lzh_interrupted.pth"]
    record = record_of(tmp_path / "lzh_interrupted.pth")
    assert (record.test_accuracy, record.test_loss, record.epochs) == (None, None, step // 5)
    again = RecordingCallback()
    done = run(color_folder, tmp_path, resume="auto", callbacks=[again])
    assert again.steps == list(range(step + 1, 13))
    assert (again.runs[0].first_step, again.runs[0].total_steps) == (step, 12)
    assert done.epochs == 3
    assert equal_weights(tmp_path / "lzh_2.pth", whole / "lzh_2.pth")
    assert record_of(tmp_path / "lzh_2.pth").test_accuracy == record_of(whole / "lzh_2.pth").test_accuracy


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_at_the_end_of_an_epoch_leaves_an_evaluated_checkpoint(color_folder: Path, tmp_path: Path) -> None:
    callback = RecordingCallback(4)
    with pytest.raises(Interrupted, match=r"step 4 of 12, checkpoint saved to .*lzh_0\.pth"):
        run(color_folder, tmp_path, callbacks=[callback])
    assert checkpoint_names(tmp_path) == ["lzh_0.pth"]
    assert record_of(tmp_path / "lzh_0.pth").test_accuracy is not None
    assert len(callback.reports) == 1


# --- keeping checkpoints


def test_keep_leaves_the_latest_and_the_best(color_folder: Path, whole: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, keep=1)
    assert checkpoint_names(tmp_path) == ["lzh_2.pth", "lzh_best.pth"]
    assert done.checkpoints == [tmp_path / "lzh_2.pth"]
    accuracies = [record_of(whole / f"lzh_{epoch}.pth").test_accuracy for epoch in range(3)]
    best = accuracies.index(max(accuracies, key=lambda accuracy: accuracy or 0.0))
    assert done.best is not None
    assert done.best[1] == accuracies[best]
    assert equal_weights(tmp_path / "lzh_best.pth", whole / f"lzh_{best}.pth")
    assert equal_weights(done.best[0], whole / f"lzh_{best}.pth")


def test_keep_does_not_remove_checkpoints_of_this_run_next_to_those_of_an_older_one(
    color_folder: Path, copied: Path
) -> None:
    done = run(color_folder, copied, epochs=1, seed=5, keep=1)
    assert done.checkpoints == [copied / "lzh_0.pth"]
    assert record_of(copied / "lzh_0.pth").seed == 5


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_below_one_is_rejected(keep: int, color_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--keep {keep} would keep no checkpoint"):
        run(color_folder, tmp_path / "run", keep=keep)
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_known_after_a_resume(color_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-12, "momentum": 0, "keep": 1}
    run(color_folder, tmp_path, **options, epochs=2)
    done = run(color_folder, tmp_path, **options, epochs=4, resume="auto")
    assert record_of(tmp_path / "lzh_best.pth").epochs == 1  # no later epoch was better
    assert done.best == (tmp_path / "lzh_best.pth", done.test_accuracy)
    assert done.checkpoints == [tmp_path / "lzh_3.pth"]


# --- resuming


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_resumes_from_a_checkpoint_by_path(epoch: int, color_folder: Path, whole: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(whole / f"lzh_{epoch}.pth", tmp_path))
    callback = RecordingCallback()
    done = run(color_folder, tmp_path / "run", resume=str(source), callbacks=[callback])
    assert callback.steps == list(range(4 * epoch + 5, 13))
    assert checkpoint_names(tmp_path / "run") == [f"lzh_{number}.pth" for number in range(epoch + 1, 3)]
    assert equal_weights(done.checkpoints[-1], whole / "lzh_2.pth")


def test_resuming_without_a_checkpoint_starts_a_new_run(color_folder: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.warns(FallbackWarning, match="no checkpoint to resume from in .*: starting a new run"):
        done = run(color_folder, tmp_path, resume="auto")
    assert equal_weights(done.checkpoints[-1], whole / "lzh_2.pth")


def test_a_finished_run_is_left_unchanged(color_folder: Path, copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.glob("*.pth")}
    callback = RecordingCallback()
    done = run(color_folder, copied, resume="auto", callbacks=[callback])
    assert callback.steps == []
    assert callback.reports == []
    assert {path.name: path.read_bytes() for path in copied.glob("*.pth")} == before
    assert done.checkpoints == [copied / "lzh_2.pth"]
    assert (done.epochs, done.images_per_s, done.stop_reason) == (3, None, None)
    assert done.test_accuracy == record_of(copied / "lzh_2.pth").test_accuracy


def test_a_finished_run_with_keep_returns_the_checkpoint_of_its_epoch(color_folder: Path, tmp_path: Path) -> None:
    """The best checkpoint is a hard link to the same file."""
    run(color_folder, tmp_path, epochs=1, keep=1)
    assert run(color_folder, tmp_path, epochs=1, keep=1, resume="auto").checkpoints == [tmp_path / "lzh_0.pth"]


def test_a_finished_run_can_be_extended(color_folder: Path, copied: Path, tmp_path: Path) -> None:
    done = run(color_folder, copied, epochs=4, resume="auto")
    assert done.checkpoints == [copied / "lzh_2.pth", copied / "lzh_3.pth"]
    longer = run(color_folder, tmp_path / "longer", epochs=4)
    assert equal_weights(copied / "lzh_3.pth", longer.checkpoints[-1])
    assert record_of(copied / "lzh_3.pth").recipe["epochs"] == 4


def test_stretching_the_schedule_issues_a_warning(color_folder: Path, tmp_path: Path) -> None:
    run(color_folder, tmp_path, epochs=1, schedule="linear")
    with pytest.warns(
        FallbackWarning, match="changing epochs from 1 to 2 stretches the learning rate schedule from this point on"
    ):
        run(color_folder, tmp_path, epochs=2, schedule="linear", resume="auto")


def test_a_resumed_run_uses_the_recorded_recipe(color_folder: Path, copied: Path) -> None:
    """No option of the recipe has to be repeated."""
    (copied / "lzh_2.pth").unlink()
    train("lzh", data=str(color_folder), out=copied, device="cpu", resume="auto")
    assert msgspec.to_builtins(record_of(copied / "lzh_2.pth").recipe) == record_of(copied / "lzh_1.pth").recipe


def test_repeated_overrides_are_checked_against_the_recorded_recipe(color_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
    run(color_folder, tmp_path, epochs=1, **options)
    done = train("lzh", data=str(color_folder), out=tmp_path, device="cpu", resume="auto", nesterov=True)
    assert done.epochs == 1


def test_a_damaged_latest_checkpoint_is_skipped(color_folder: Path, whole: Path, copied: Path) -> None:
    path = copied / "lzh_2.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.warns(FallbackWarning, match=r"skipping a damaged checkpoint: .*lzh_2\.pth"):
        done = run(color_folder, copied, resume="auto")
    assert equal_weights(done.checkpoints[-1], whole / "lzh_2.pth")


@pytest.mark.parametrize(
    ("options", "both"),
    [
        ({"seed": 4}, ("seed 0", "not 4")),
        ({"model": "fastnet"}, ("lzh", "not fastnet")),
        ({"learning_rate": 0.25}, ("learning_rate 0.05", "not 0.25")),
        ({"batch_size": 20, "flip": False}, ("batch_size 16, not 20", "flip True, not False")),
        ({"recipe_name": "fast"}, ("schedule 'constant'", "not 'linear'")),
    ],
)
def test_another_run_cannot_be_resumed(
    options: dict[str, Any], both: tuple[str, str], color_folder: Path, copied: Path
) -> None:
    before = {path.name: path.read_bytes() for path in copied.glob("*.pth")}
    with pytest.raises(UsageError) as caught:
        run(color_folder, copied, resume=str(copied / "lzh_1.pth"), **options)
    assert all(word in caught.value.problem for word in both), caught.value.problem
    assert "lzh_1.pth" in caught.value.problem
    assert {path.name: path.read_bytes() for path in copied.glob("*.pth")} == before


def test_a_run_cannot_resume_on_other_images(copied: Path, tmp_path: Path) -> None:
    other = write_image_folder(tmp_path / "colors", seed=1)
    fingerprint = record_of(copied / "lzh_1.pth").data.train_fingerprint[:12]
    with pytest.raises(CifarxError, match=f"training data {fingerprint}, not "):
        run(other, copied, resume="auto")


def test_weights_without_a_training_state_are_rejected(color_folder: Path, whole: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(whole / "lzh_0.pth")
    for training in ({}, {"epoch": 0, "step": 4, "shuffle": torch.Generator().get_state()}):
        save_checkpoint(tmp_path / "lzh_0.pth", loaded._replace(training=training))
        with pytest.raises(ModelFileError, match=r"lzh_0\.pth contains weights but no training state"):
            run(color_folder, tmp_path, resume=str(tmp_path / "lzh_0.pth"))


@pytest.mark.parametrize(
    "change", [{"optimizer": {}}, {"random": {}}, {"shuffle": torch.zeros(3)}, {"best_epoch": None}]
)
def test_an_invalid_training_state_raises_model_file_error(
    change: dict[str, Any], color_folder: Path, whole: Path, tmp_path: Path
) -> None:
    loaded = load_checkpoint(whole / "lzh_0.pth")
    training = {name: value for name, value in {**loaded.training, **change}.items() if value is not None}
    save_checkpoint(tmp_path / "lzh_0.pth", loaded._replace(training=training))
    with pytest.raises(ModelFileError, match=r"lzh_0\.pth cannot be resumed from"):
        run(color_folder, tmp_path, resume="auto")


def test_a_missing_checkpoint_is_an_error(color_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=re.escape("absent.pth")):
        run(color_folder, tmp_path / "run", resume="absent.pth")
    assert not (tmp_path / "run").exists()
