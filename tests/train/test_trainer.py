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
from cifarx_train.callbacks.base import Callback, EpochReport, RunStart
from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from cifarx_train.data.loaders.device import DeviceImages
from cifarx_train.data.selection import select_data
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluator
from cifarx_train.train import TrainResult, train
from tests.support.drawn_images import draw_folder

# The whole run that others are measured against: three epochs of four steps.
RECIPE: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 0.05,
    "momentum": 0.5,
    "flip": True,
    "crop": 2,
}


class Diary(Callback):
    """Writes down what it is told; sends itself a signal after a step, if told so."""

    def __init__(self, signal_after: int | None = None, number: int = signal.SIGTERM) -> None:
        self.start: list[RunStart] = []
        self.reports: list[EpochReport] = []
        self.steps: list[int] = []
        self.ended = 0
        self.signal_after, self.number = signal_after, number

    def on_start(self, run: RunStart) -> None:
        self.start.append(run)

    def on_step(self, step: int) -> None:
        self.steps.append(step)
        if step == self.signal_after:
            signal.raise_signal(self.number)

    def on_epoch(self, report: EpochReport) -> None:
        self.reports.append(report)

    def on_end(self) -> None:
        self.ended += 1


def run(data: Path, out: Path, model: str = "lzh", **options: Any) -> TrainResult:
    return train(model, data=str(data), out=out, device="cpu", **{**RECIPE, **options})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def record_of(path: Path) -> TrainingRecord:
    record = load_checkpoint(path).spec.training
    assert record is not None
    return record


def equal_weights(one: Path, other: Path) -> bool:
    first, second = load_checkpoint(one).model, load_checkpoint(other).model
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(drawn_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run; nothing is to be written to it."""
    folder = tmp_path_factory.mktemp("whole")
    run(drawn_once, folder)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, with the times of its files."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


# --- ends before the last epoch


def test_patience_ends_a_run_that_gets_no_better(drawn_once: Path, tmp_path: Path) -> None:
    diary = Diary()
    done = run(drawn_once, tmp_path, epochs=9, learning_rate=1e-12, momentum=0, patience=2, callbacks=[diary])
    assert files(tmp_path) == ["lzh_0.pth", "lzh_1.pth", "lzh_2.pth"]
    assert done.epochs == 3
    assert done.stopped is not None
    assert "patience" in done.stopped
    assert "epoch 1 " in done.stopped  # counted from 1, as the table shows them
    assert done.best == (tmp_path / "lzh_0.pth", done.test_accuracy)
    assert diary.ended == 1


def test_patience_lets_a_run_that_gets_better_go_on(drawn_once: Path, tmp_path: Path) -> None:
    done = run(drawn_once, tmp_path, epochs=3, patience=3)
    assert (done.epochs, done.stopped) == (3, None)


def test_a_run_out_of_patience_trains_no_more(drawn_once: Path, tmp_path: Path) -> None:
    options = {"epochs": 9, "learning_rate": 1e-12, "momentum": 0, "patience": 1}
    first = run(drawn_once, tmp_path, **options)
    assert first.epochs == 2
    diary = Diary()
    again = run(drawn_once, tmp_path, **options, resume="auto", callbacks=[diary])
    assert diary.steps == []
    assert again.stopped is not None
    assert "patience" in again.stopped
    assert again.checkpoints == [tmp_path / "lzh_1.pth"]
    assert (again.epochs, again.test_accuracy) == (2, first.test_accuracy)
    longer = run(drawn_once, tmp_path, **{**options, "patience": 3}, resume="auto")
    assert longer.epochs == 4


def judge_afresh(path: Path, data: Path) -> float:
    spec = InputSpec(height=32, width=32)
    test = select_data(str(data)).load("test", spec)
    cpu = torch.device("cpu")
    return (
        Evaluator(DeviceImages(test, cpu), spec, 3, cpu, Distributed()).evaluate(load_checkpoint(path).build()).accuracy
    )


def test_a_run_whose_time_is_over_is_judged_saved_and_can_go_on(drawn_once: Path, whole: Path, tmp_path: Path) -> None:
    diary = Diary()
    done = run(drawn_once, tmp_path, max_minutes=1e-9, callbacks=[diary])
    assert diary.steps == [1]
    assert files(tmp_path) == ["lzh_interrupted.pth"]
    assert done.checkpoints == [tmp_path / "lzh_interrupted.pth"]
    assert done.epochs == 0
    assert done.stopped is not None
    assert "time is over" in done.stopped
    record = record_of(done.checkpoints[0])
    assert (record.epochs, record.test_accuracy) == (0, done.test_accuracy)
    assert done.test_accuracy == judge_afresh(done.checkpoints[0], drawn_once)
    assert diary.reports[0].checkpoint == done.checkpoints[0]
    again = run(drawn_once, tmp_path, max_minutes=100, resume="auto")
    assert (again.epochs, again.stopped) == (3, None)
    assert again.checkpoints == [tmp_path / f"lzh_{epoch}.pth" for epoch in range(3)]
    assert files(tmp_path) == ["lzh_0.pth", "lzh_1.pth", "lzh_2.pth"]
    assert all(equal_weights(path, whole / path.name) for path in again.checkpoints)


def test_a_run_without_a_whole_epoch_has_no_best(drawn_once: Path, tmp_path: Path) -> None:
    done = run(drawn_once, tmp_path, max_minutes=1e-9)
    assert done.best is None
    assert [path.name for path in done.checkpoints] == ["lzh_interrupted.pth"]


def test_a_run_whose_time_is_over_at_the_end_of_an_epoch_says_so(drawn_once: Path, tmp_path: Path) -> None:
    done = run(drawn_once, tmp_path, batch_size=60, max_minutes=1e-9)
    assert (done.epochs, files(tmp_path)) == (1, ["lzh_0.pth"])
    assert done.stopped is not None
    assert "time is over" in done.stopped


def test_a_run_that_ends_with_its_time_was_not_stopped(drawn_once: Path, tmp_path: Path) -> None:
    done = run(drawn_once, tmp_path, epochs=1, batch_size=60, max_minutes=1e-9)
    assert (done.epochs, done.stopped) == (1, None)


def test_the_time_before_counts_when_a_run_goes_on(drawn_once: Path, tmp_path: Path) -> None:
    run(drawn_once, tmp_path, max_minutes=1e-9)
    diary = Diary()
    run(drawn_once, tmp_path, max_minutes=1e-9, resume="auto", callbacks=[diary])
    assert diary.steps == [2]


@pytest.mark.skipif(os.name == "nt", reason="signals are told otherwise there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 6])
def test_a_signal_ends_the_step_saves_and_leaves_the_rest(
    step: int, number: int, drawn_once: Path, whole: Path, tmp_path: Path
) -> None:
    before, diary = signal.getsignal(number), Diary(step, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(Interrupted, match=rf"step {step} of 12, saved in .*lzh_interrupted\.pth.*--resume") as caught:
        run(drawn_once, tmp_path, callbacks=[diary])
    assert caught.value.exit_status == 128 + number
    assert diary.steps == list(range(1, step + 1))
    assert diary.ended == 1
    signal.signal(signal.SIGINT, before if number == signal.SIGINT else signal.getsignal(signal.SIGINT))
    assert signal.getsignal(number) == before
    assert files(tmp_path) == [*(["lzh_0.pth"] if step > 4 else []), "lzh_interrupted.pth"]
    record = record_of(tmp_path / "lzh_interrupted.pth")
    assert (record.test_accuracy, record.test_loss, record.epochs) == (None, None, step // 5)
    again = Diary()
    done = run(drawn_once, tmp_path, resume="auto", callbacks=[again])
    assert again.steps == list(range(step + 1, 13))
    assert (again.start[0].first_step, again.start[0].steps) == (step, 12)
    assert done.epochs == 3
    assert equal_weights(tmp_path / "lzh_2.pth", whole / "lzh_2.pth")
    assert record_of(tmp_path / "lzh_2.pth").test_accuracy == record_of(whole / "lzh_2.pth").test_accuracy


@pytest.mark.skipif(os.name == "nt", reason="signals are told otherwise there")
def test_a_signal_at_the_end_of_an_epoch_leaves_a_judged_checkpoint(drawn_once: Path, tmp_path: Path) -> None:
    diary = Diary(4)
    with pytest.raises(Interrupted, match=r"step 4 of 12, saved in .*lzh_0\.pth"):
        run(drawn_once, tmp_path, callbacks=[diary])
    assert files(tmp_path) == ["lzh_0.pth"]
    assert record_of(tmp_path / "lzh_0.pth").test_accuracy is not None
    assert len(diary.reports) == 1


# --- what is kept


def test_keep_leaves_the_newest_and_the_best(drawn_once: Path, whole: Path, tmp_path: Path) -> None:
    done = run(drawn_once, tmp_path, keep=1)
    assert files(tmp_path) == ["lzh_2.pth", "lzh_best.pth"]
    assert done.checkpoints == [tmp_path / "lzh_2.pth"]
    accuracies = [record_of(whole / f"lzh_{epoch}.pth").test_accuracy for epoch in range(3)]
    best = accuracies.index(max(accuracies, key=lambda accuracy: accuracy or 0.0))
    assert done.best[1] == accuracies[best]
    assert equal_weights(tmp_path / "lzh_best.pth", whole / f"lzh_{best}.pth")
    assert equal_weights(done.best[0], whole / f"lzh_{best}.pth")


def test_keep_spares_what_this_run_wrote_in_the_folder_of_an_older_one(drawn_once: Path, copied: Path) -> None:
    done = run(drawn_once, copied, epochs=1, seed=5, keep=1)
    assert done.checkpoints == [copied / "lzh_0.pth"]
    assert record_of(copied / "lzh_0.pth").seed == 5


@pytest.mark.parametrize("keep", [0, -1])
def test_to_keep_nothing_is_refused(keep: int, drawn_once: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--keep {keep} keeps nothing"):
        run(drawn_once, tmp_path / "run", keep=keep)
    assert not (tmp_path / "run").exists()


def test_the_best_is_known_also_over_a_continuation(drawn_once: Path, tmp_path: Path) -> None:
    options = {"learning_rate": 1e-12, "momentum": 0, "keep": 1}
    run(drawn_once, tmp_path, **options, epochs=2)
    done = run(drawn_once, tmp_path, **options, epochs=4, resume="auto")
    assert record_of(tmp_path / "lzh_best.pth").epochs == 1  # no later one was better
    assert done.best == (tmp_path / "lzh_best.pth", done.test_accuracy)
    assert done.checkpoints == [tmp_path / "lzh_3.pth"]


# --- going on


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_goes_on_from_a_checkpoint_by_name(epoch: int, drawn_once: Path, whole: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(whole / f"lzh_{epoch}.pth", tmp_path))
    diary = Diary()
    done = run(drawn_once, tmp_path / "run", resume=str(source), callbacks=[diary])
    assert diary.steps == list(range(4 * epoch + 5, 13))
    assert files(tmp_path / "run") == [f"lzh_{number}.pth" for number in range(epoch + 1, 3)]
    assert equal_weights(done.checkpoints[-1], whole / "lzh_2.pth")


def test_nothing_to_go_on_from_is_told_and_starts_a_new_run(drawn_once: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.warns(FallbackWarning, match="nothing to resume in .*: a new run"):
        done = run(drawn_once, tmp_path, resume="auto")
    assert equal_weights(done.checkpoints[-1], whole / "lzh_2.pth")


def test_a_finished_run_stays_as_it_is(drawn_once: Path, copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.glob("*.pth")}
    diary = Diary()
    done = run(drawn_once, copied, resume="auto", callbacks=[diary])
    assert diary.steps == []
    assert diary.reports == []
    assert {path.name: path.read_bytes() for path in copied.glob("*.pth")} == before
    assert done.checkpoints == [copied / "lzh_2.pth"]
    assert (done.epochs, done.images_per_s, done.stopped) == (3, None, None)
    assert done.test_accuracy == record_of(copied / "lzh_2.pth").test_accuracy


def test_a_finished_run_that_kept_one_is_named_by_its_epoch(drawn_once: Path, tmp_path: Path) -> None:
    """Its best is a second name of the same file."""
    run(drawn_once, tmp_path, epochs=1, keep=1)
    assert run(drawn_once, tmp_path, epochs=1, keep=1, resume="auto").checkpoints == [tmp_path / "lzh_0.pth"]


def test_a_finished_run_may_be_made_longer(drawn_once: Path, copied: Path, tmp_path: Path) -> None:
    done = run(drawn_once, copied, epochs=4, resume="auto")
    assert done.checkpoints == [copied / "lzh_2.pth", copied / "lzh_3.pth"]
    longer = run(drawn_once, tmp_path / "longer", epochs=4)
    assert equal_weights(copied / "lzh_3.pth", longer.checkpoints[-1])
    assert record_of(copied / "lzh_3.pth").recipe["epochs"] == 4


def test_a_schedule_that_is_stretched_is_told(drawn_once: Path, tmp_path: Path) -> None:
    run(drawn_once, tmp_path, epochs=1, schedule="linear")
    with pytest.warns(FallbackWarning, match="2 epochs in place of 1 stretch the learning-rate schedule"):
        run(drawn_once, tmp_path, epochs=2, schedule="linear", resume="auto")


def test_the_recipe_is_that_of_the_run(drawn_once: Path, copied: Path) -> None:
    """Nothing of it need be given again."""
    (copied / "lzh_2.pth").unlink()
    train("lzh", data=str(drawn_once), out=copied, device="cpu", resume="auto")
    assert msgspec.to_builtins(record_of(copied / "lzh_2.pth").recipe) == record_of(copied / "lzh_1.pth").recipe


def test_what_is_given_again_need_only_fit_the_run_itself(drawn_once: Path, tmp_path: Path) -> None:
    options = {"momentum": 0.9, "nesterov": True}
    run(drawn_once, tmp_path, epochs=1, **options)
    done = train("lzh", data=str(drawn_once), out=tmp_path, device="cpu", resume="auto", nesterov=True)
    assert done.epochs == 1


def test_a_damaged_newest_is_passed_over(drawn_once: Path, whole: Path, copied: Path) -> None:
    path = copied / "lzh_2.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.warns(FallbackWarning, match=r"passing over a damaged checkpoint: .*lzh_2\.pth"):
        done = run(drawn_once, copied, resume="auto")
    assert equal_weights(done.checkpoints[-1], whole / "lzh_2.pth")


@pytest.mark.parametrize(
    ("options", "both"),
    [
        ({"seed": 4}, ("seed 0", "not 4")),
        ({"model": "fastnet"}, ("lzh", "not fastnet")),
        ({"learning_rate": 0.25}, ("learning_rate 0.05", "not 0.25")),
        ({"batch_size": 20, "flip": False}, ("batch_size 16 and not 20", "flip True and not False")),
        ({"recipe_name": "fast"}, ("schedule 'constant'", "not 'linear'")),
    ],
)
def test_another_run_is_not_a_continuation(
    options: dict[str, Any], both: tuple[str, str], drawn_once: Path, copied: Path
) -> None:
    before = {path.name: path.read_bytes() for path in copied.glob("*.pth")}
    with pytest.raises(UsageError) as caught:
        run(drawn_once, copied, resume=str(copied / "lzh_1.pth"), **options)
    assert all(word in caught.value.problem for word in both), caught.value.problem
    assert "lzh_1.pth" in caught.value.problem
    assert {path.name: path.read_bytes() for path in copied.glob("*.pth")} == before


def test_other_images_are_another_run(copied: Path, tmp_path: Path) -> None:
    other = draw_folder(tmp_path / "colours", seed=1)
    fingerprint = record_of(copied / "lzh_1.pth").data.train_fingerprint[:12]
    with pytest.raises(CifarxError, match=f"training data {fingerprint}, not "):
        run(other, copied, resume="auto")


def test_weights_without_a_run_are_refused(drawn_once: Path, whole: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(whole / "lzh_0.pth")
    for training in ({}, {"epoch": 0, "step": 4, "shuffle": torch.Generator().get_state()}):
        save_checkpoint(tmp_path / "lzh_0.pth", loaded._replace(training=training))
        with pytest.raises(ModelFileError, match=r"lzh_0\.pth holds weights, and no state of a run"):
            run(drawn_once, tmp_path, resume=str(tmp_path / "lzh_0.pth"))


@pytest.mark.parametrize(
    "change", [{"optimizer": {}}, {"random": {}}, {"shuffle": torch.zeros(3)}, {"best_epoch": None}]
)
def test_a_state_that_does_not_fit_is_an_error_of_the_file(
    change: dict[str, Any], drawn_once: Path, whole: Path, tmp_path: Path
) -> None:
    loaded = load_checkpoint(whole / "lzh_0.pth")
    training = {name: value for name, value in {**loaded.training, **change}.items() if value is not None}
    save_checkpoint(tmp_path / "lzh_0.pth", loaded._replace(training=training))
    with pytest.raises(ModelFileError, match=r"lzh_0\.pth cannot be continued"):
        run(drawn_once, tmp_path, resume="auto")


def test_a_checkpoint_that_is_absent_is_an_error(drawn_once: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=re.escape("absent.pth")):
        run(drawn_once, tmp_path / "run", resume="absent.pth")
    assert not (tmp_path / "run").exists()
