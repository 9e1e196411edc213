"""Where a run goes on, what it asks for, and what it refuses. Kills and signals: tests/e2e/test_resume.py."""

import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cifarx_serve.errors import FallbackWarning, ModelFileError, UsageError
from cifarx_train.callbacks.base import Callback
from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from cifarx_train.checkpoints.directory import CheckpointDirectory
from cifarx_train.checkpoints.resume import resume_point
from cifarx_train.models.registry import network
from cifarx_train.train import train
from cifarx_train.trainer import TrainResult
from tests.support.drawn_images import draw_folder
from tests.support.same_runs import same


def run(data: Path, out: Path, **more: Any) -> TrainResult:
    settings: dict[str, Any] = {"model": "lzh", "epochs": 3, "batch_size": 16, **more}
    return train(settings.pop("model"), data=str(data), device="cpu", out=out, **settings)


@pytest.fixture(scope="module")
def plain(drawn_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of the notes' recipe, a constant rate; not to be written to."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(drawn_once, out)
    return out


@pytest.fixture(scope="module")
def scheduled(drawn_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of momentum, schedule, warm-up, average and augmentation; not to be written to."""
    out = tmp_path_factory.mktemp("scheduled") / "run"
    run(drawn_once, out, epochs=2, recipe_name="fast", ema=0.9)
    return out


def copy_of(folder: Path, out: Path, epochs: int) -> Path:
    out.mkdir()
    for epoch in range(epochs):
        shutil.copy2(folder / f"lzh_{epoch}.pth", out)
    return out


def require_same_file(found: Path, expected: Path) -> None:
    one, other = load_checkpoint(found), load_checkpoint(expected)
    assert one.spec == other.spec
    assert same(one.model, other.model)
    assert same({**one.training, "seconds": 0}, {**other.training, "seconds": 0})


# --- where it goes on


def test_auto_in_an_empty_folder_is_a_new_run_and_says_so(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.warns(FallbackWarning, match="nothing to resume in .*: a new run"):
        done = run(drawn_once, tmp_path / "run", resume="auto")
    assert done.epochs == 3
    require_same_file(tmp_path / "run" / "lzh_2.pth", plain / "lzh_2.pth")


def test_auto_takes_no_other_networks_checkpoints(plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "run", 3)
    with pytest.warns(FallbackWarning, match="nothing to resume"):
        assert resume_point("auto", CheckpointDirectory(out, "fastnet")) is None


@pytest.mark.parametrize("epochs", [1, 2])
def test_auto_goes_on_from_the_newest(drawn_once: Path, plain: Path, tmp_path: Path, epochs: int) -> None:
    out = copy_of(plain, tmp_path / "run", epochs)
    done = run(drawn_once, out, resume="auto")
    assert [path.name for path in done.checkpoints] == [f"lzh_{epoch}.pth" for epoch in range(epochs - 1, 3)]
    assert done.epochs == 3
    for epoch in range(3):
        require_same_file(out / f"lzh_{epoch}.pth", plain / f"lzh_{epoch}.pth")


def test_the_newest_is_the_one_written_last(plain: Path, tmp_path: Path) -> None:
    """A new run in the folder of a longer one: its first epoch is newer than the old run's third."""
    out = copy_of(plain, tmp_path / "run", 3)
    os.utime(out / "lzh_0.pth")
    point = resume_point("auto", CheckpointDirectory(out, "lzh"))
    assert point is not None
    assert point.path == out / "lzh_0.pth"


def test_a_file_by_name_goes_on_in_another_folder(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    run(drawn_once, tmp_path / "run", resume=str(plain / "lzh_0.pth"))
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["lzh_1.pth", "lzh_2.pth"]
    require_same_file(tmp_path / "run" / "lzh_2.pth", plain / "lzh_2.pth")


def test_a_finished_run_has_nothing_left_to_train(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "run", 3)
    before = {path.name: path.read_bytes() for path in out.glob("*.pth")}
    done = run(drawn_once, out, resume="auto")
    assert done.checkpoints == [out / "lzh_2.pth"]
    assert done.test_accuracy == load_checkpoint(out / "lzh_2.pth").spec.training.test_accuracy  # type: ignore[union-attr]
    assert done.images_per_s is None
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before


def test_what_a_killed_run_left_half_written_is_removed(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "run", 2)
    (out / ".x1y2.partial.pth").write_bytes(b"half")
    (out / "notes.txt").write_text("mine")
    run(drawn_once, out, resume="auto")
    assert sorted(path.name for path in out.iterdir()) == ["logs", "lzh_0.pth", "lzh_1.pth", "lzh_2.pth", "notes.txt"]


# --- damage


def test_a_byte_altered_anywhere_in_the_data_is_found(plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "run", 3)
    newest = out / "lzh_2.pth"
    good = newest.read_bytes()
    with zipfile.ZipFile(newest) as archive:
        members = [member for member in archive.infolist() if member.file_size]
        offsets = {member.filename: member.header_offset for member in members}
    dice = random.Random(0)
    for member in members + dice.choices(members, k=10):
        header = offsets[member.filename]
        names = int.from_bytes(good[header + 26 : header + 28], "little")
        extra = int.from_bytes(good[header + 28 : header + 30], "little")
        content = bytearray(good)
        content[header + 30 + names + extra + dice.randrange(member.file_size)] ^= 1 << dice.randrange(8)
        newest.write_bytes(content)
        with pytest.warns(FallbackWarning, match=r"passing over a damaged checkpoint: .*lzh_2\.pth"):
            point = resume_point("auto", CheckpointDirectory(out, "lzh"))
        assert point is not None
        assert point.path == out / "lzh_1.pth", member.filename


def test_a_damaged_file_by_name_is_refused(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "run", 2)
    os.truncate(out / "lzh_1.pth", 1000)
    with pytest.raises(ModelFileError, match=r"lzh_1\.pth is not a checkpoint"):
        run(drawn_once, out, resume=str(out / "lzh_1.pth"))


def test_a_file_that_is_absent_is_refused_and_leaves_no_folder(drawn_once: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        run(drawn_once, tmp_path / "run", resume="lzh_7.pth")
    assert not (tmp_path / "run").exists()


def test_weights_without_the_state_of_a_run_are_refused(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    save_checkpoint(path, load_checkpoint(plain / "lzh_0.pth")._replace(training={}))
    with pytest.raises(ModelFileError, match="holds weights, and no state of a run"):
        run(drawn_once, tmp_path / "run", resume=str(path))
    torch.save(network("lzh").build(3).state_dict(), path)
    with (
        pytest.warns(FallbackWarning, match="is taken for lzh"),
        pytest.raises(ModelFileError, match="holds weights, and no state of a run"),
    ):
        run(drawn_once, tmp_path / "run", resume=str(path))


@pytest.mark.parametrize("part", ["optimizer", "random", "best_epoch", "epoch", "weights", "seconds", "scaler"])
def test_a_state_with_a_part_missing_is_refused(drawn_once: Path, plain: Path, tmp_path: Path, part: str) -> None:
    path = tmp_path / "lacking.pth"
    checkpoint = load_checkpoint(plain / "lzh_0.pth")
    del checkpoint.training[part]
    save_checkpoint(path, checkpoint)
    with pytest.raises(ModelFileError, match=r"lacking\.pth cannot be continued"):
        run(drawn_once, tmp_path / "run", resume=str(path))


def test_the_weights_of_another_network_are_refused(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    save_checkpoint(path, load_checkpoint(plain / "lzh_0.pth")._replace(model=network("lzh").build(9).state_dict()))
    with pytest.raises(ModelFileError, match=r"other\.pth cannot be continued"):
        run(drawn_once, tmp_path / "run", resume=str(path))


# --- whether it is the same run


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"learning_rate": 0.5}, "has learning_rate 0.01 and not 0.5"),
        ({"batch_size": 8}, "has batch_size 16 and not 8"),
        ({"momentum": 0.9}, "has momentum 0.0 and not 0.9"),
        ({"ema": 0.9}, "has ema None and not 0.9"),
        ({"recipe_name": "fast"}, "has name 'notes' and not 'fast'"),
        ({"seed": 1}, "was trained with the seed 0, not 1"),
    ],
)
def test_another_run_is_refused(drawn_once: Path, plain: Path, tmp_path: Path, more: Any, told: str) -> None:
    out = copy_of(plain, tmp_path / "run", 2)
    with pytest.raises(UsageError) as caught:
        run(drawn_once, out, resume="auto", **more)
    assert told in caught.value.problem
    assert sorted(path.name for path in out.glob("*.pth")) == ["lzh_0.pth", "lzh_1.pth"]


def test_another_network_is_refused(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was trained with the model lzh, not fastnet"):
        run(drawn_once, tmp_path / "run", model="fastnet", resume=str(plain / "lzh_0.pth"))


def test_another_image_size_is_refused(drawn_once: Path, tmp_path: Path) -> None:
    once = {"model": "fastnet", "data": str(drawn_once), "device": "cpu", "epochs": 1, "out": tmp_path / "run"}
    train(**once, image_size=16)
    with pytest.raises(UsageError, match=r"fastnet_0\.pth was trained with images of 16x16, not 20x20"):
        train(**once, image_size=20, resume="auto")


def test_other_data_are_refused(plain: Path, tmp_path: Path) -> None:
    other = draw_folder(tmp_path / "colours", seed=1)
    with pytest.raises(UsageError, match=r"was trained with training data .*, not "):
        run(other, tmp_path / "run", resume=str(plain / "lzh_0.pth"))


def test_the_same_recipe_by_name_or_by_its_values_is_the_same_run(
    drawn_once: Path, scheduled: Path, tmp_path: Path
) -> None:
    for number, more in enumerate(({"recipe_name": "fast", "ema": 0.9}, {"momentum": 0.9}, {})):
        out = copy_of(scheduled, tmp_path / str(number), 1)
        run(drawn_once, out, epochs=2, resume="auto", **more)
        require_same_file(out / "lzh_1.pth", scheduled / "lzh_1.pth")


# --- another end


def test_more_epochs_at_a_constant_rate_give_the_bits_of_the_longer_run(
    drawn_once: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(drawn_once, out, epochs=1)
    done = run(drawn_once, out, epochs=3, resume="auto")
    assert done.epochs == 3
    require_same_file(out / "lzh_2.pth", plain / "lzh_2.pth")


def test_more_epochs_stretch_a_schedule_and_it_is_told(drawn_once: Path, scheduled: Path, tmp_path: Path) -> None:
    out = copy_of(scheduled, tmp_path / "run", 2)
    with pytest.warns(FallbackWarning, match="3 epochs in place of 2 stretch the learning-rate schedule"):
        done = run(drawn_once, out, epochs=3, resume="auto")
    assert done.epochs == 3
    record = load_checkpoint(out / "lzh_2.pth").spec.training
    assert record is not None
    assert msgspec.to_builtins(record.recipe)["epochs"] == 3


def test_no_epochs_given_are_those_of_the_run(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "run", 1)
    assert train("lzh", data=str(drawn_once), device="cpu", out=out, resume="auto").epochs == 3


def test_patience_can_end_a_run_that_goes_on(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "run", 3)
    best = load_checkpoint(out / "lzh_2.pth").training["best_epoch"]
    done = run(drawn_once, out, epochs=9, patience=1, resume="auto")
    assert done.stopped
    assert done.epochs <= max(best + 2, 9)


def test_time_counts_from_the_start_of_the_run(drawn_once: Path, plain: Path, tmp_path: Path) -> None:
    """A run of two hours that goes on with `max_minutes` 60 ends after one step, and that step is saved."""
    path = tmp_path / "run" / "lzh_0.pth"
    checkpoint = load_checkpoint(plain / "lzh_0.pth")
    save_checkpoint(path, checkpoint._replace(training={**checkpoint.training, "seconds": 7200.0}))
    done = run(drawn_once, path.parent, max_minutes=60, resume="auto")
    assert done.stopped
    assert load_checkpoint(path.parent / "lzh_interrupted.pth").training["done"] == 1
    # With the limit gone it goes on to the bits of the run that had none.
    run(drawn_once, path.parent, resume="auto", max_minutes=600)
    assert same(load_checkpoint(path.with_name("lzh_2.pth")).model, load_checkpoint(plain / "lzh_2.pth").model)


# --- what TensorBoard shows


class Breaks(Callback):
    """A run that fails after a step, past what was saved."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, step: int) -> None:
        if step == self._step:
            raise RuntimeError(step)


def test_the_curves_go_on_without_a_gap_and_without_doubles(drawn_once: Path, tmp_path: Path) -> None:
    """60 steps an epoch, a reading every 100: what was told after the checkpoint of step 180 is told anew."""
    more: dict[str, Any] = {"batch_size": 1, "epochs": 4, "learning_rate": 0.001}
    with pytest.raises(RuntimeError, match="205"):
        run(drawn_once, tmp_path / "run", callbacks=[Breaks(205)], **more)
    run(drawn_once, tmp_path / "run", resume="auto", **more)
    run(drawn_once, tmp_path / "whole", **more)
    found, expected = curves(tmp_path / "run" / "logs"), curves(tmp_path / "whole" / "logs")
    assert [step for step, _ in found["train_loss"]] == [100, 200]
    assert found["train_loss"] == expected["train_loss"]
    for name in ("test_loss", "accuracy"):
        assert [step for step, _ in found[name]] == [0, 1, 2, 3], name
        assert found[name] == expected[name]


def curves(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values as TensorBoard reads them from all files of the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(logs))
    read.Reload()
    return {name: [(point.step, point.value) for point in read.Scalars(name)] for name in read.Tags()["scalars"]}
