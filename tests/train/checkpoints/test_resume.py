"""Resuming a run, and runs that cannot be resumed. See tests/e2e/test_resume.py for killed processes and signals."""

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
from cifarx_train.checkpoints.resume import find_resume_point
from cifarx_train.models.registry import get_architecture
from cifarx_train.train import train
from cifarx_train.trainer import TrainResult
from tests.support.checkpoint_assertions import deep_equal
from tests.support.image_datasets import write_image_folder


def run(data: Path, out: Path, **more: Any) -> TrainResult:
    settings: dict[str, Any] = {"model": "lzh", "epochs": 3, "batch_size": 16, **more}
    return train(settings.pop("model"), data=str(data), device="cpu", out=out, **settings)


@pytest.fixture(scope="module")
def plain(color_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of the `notes` recipe with a constant learning rate. Tests must not write to it."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(color_folder, out)
    return out


@pytest.fixture(scope="module")
def scheduled(color_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with momentum, schedule, warm-up, weight average and augmentation. Tests must not write to it."""
    out = tmp_path_factory.mktemp("scheduled") / "run"
    run(color_folder, out, epochs=2, recipe_name="fast", ema_decay=0.9)
    return out


def copy_checkpoints(folder: Path, out: Path, epochs: int) -> Path:
    out.mkdir()
    for epoch in range(epochs):
        shutil.copy2(folder / f"lzh_{epoch}.pth", out)
    return out


def assert_same_file(found: Path, expected: Path) -> None:
    one, other = load_checkpoint(found), load_checkpoint(expected)
    assert one.spec == other.spec
    assert deep_equal(one.weights, other.weights)
    assert deep_equal({**one.training, "seconds": 0}, {**other.training, "seconds": 0})


# --- the checkpoint to resume from


def test_auto_in_an_empty_directory_starts_a_new_run(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.warns(FallbackWarning, match="no checkpoint to resume from in .*: starting a new run"):
        done = run(color_folder, tmp_path / "run", resume="auto")
    assert done.epochs == 3
    assert_same_file(tmp_path / "run" / "lzh_2.pth", plain / "lzh_2.pth")


def test_auto_ignores_checkpoints_of_other_models(plain: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", 3)
    with pytest.warns(FallbackWarning, match="no checkpoint to resume from"):
        assert find_resume_point("auto", CheckpointDirectory(out, "fastnet")) is None


@pytest.mark.parametrize("epochs", [1, 2])
def test_auto_resumes_from_the_latest(color_folder: Path, plain: Path, tmp_path: Path, epochs: int) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", epochs)
    done = run(color_folder, out, resume="auto")
    assert [path.name for path in done.checkpoints] == [f"lzh_{epoch}.pth" for epoch in range(epochs - 1, 3)]
    assert done.epochs == 3
    for epoch in range(3):
        assert_same_file(out / f"lzh_{epoch}.pth", plain / f"lzh_{epoch}.pth")


def test_the_latest_is_the_last_one_written(plain: Path, tmp_path: Path) -> None:
    """In a new run in the directory of a longer one, the first epoch is newer than the third epoch of the old run."""
    out = copy_checkpoints(plain, tmp_path / "run", 3)
    os.utime(out / "lzh_0.pth")
    point = find_resume_point("auto", CheckpointDirectory(out, "lzh"))
    assert point is not None
    assert point.path == out / "lzh_0.pth"


def test_a_run_resumes_in_another_directory(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    run(color_folder, tmp_path / "run", resume=str(plain / "lzh_0.pth"))
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["lzh_1.pth", "lzh_2.pth"]
    assert_same_file(tmp_path / "run" / "lzh_2.pth", plain / "lzh_2.pth")


def test_a_finished_run_has_nothing_left_to_train(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", 3)
    before = {path.name: path.read_bytes() for path in out.glob("*.pth")}
    done = run(color_folder, out, resume="auto")
    assert done.checkpoints == [out / "lzh_2.pth"]
    assert done.test_accuracy == load_checkpoint(out / "lzh_2.pth").spec.training.test_accuracy  # type: ignore[union-attr]
    assert done.images_per_s is None
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before


def test_partial_files_of_a_killed_run_are_removed(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", 2)
    (out / ".x1y2.partial.pth").write_bytes(b"half")
    (out / "notes.txt").write_text("mine")
    run(color_folder, out, resume="auto")
    assert sorted(path.name for path in out.iterdir()) == ["logs", "lzh_0.pth", "lzh_1.pth", "lzh_2.pth", "notes.txt"]


# --- damaged files


def test_a_flipped_bit_anywhere_in_the_data_is_detected(plain: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", 3)
    latest = out / "lzh_2.pth"
    good = latest.read_bytes()
    with zipfile.ZipFile(latest) as archive:
        members = [member for member in archive.infolist() if member.file_size]
        offsets = {member.filename: member.header_offset for member in members}
    rng = random.Random(0)
    for member in members + rng.choices(members, k=10):
        header = offsets[member.filename]
        names = int.from_bytes(good[header + 26 : header + 28], "little")
        extra = int.from_bytes(good[header + 28 : header + 30], "little")
        content = bytearray(good)
        content[header + 30 + names + extra + rng.randrange(member.file_size)] ^= 1 << rng.randrange(8)
        latest.write_bytes(content)
        with pytest.warns(FallbackWarning, match=r"skipping a damaged checkpoint: .*lzh_2\.pth"):
            point = find_resume_point("auto", CheckpointDirectory(out, "lzh"))
        assert point is not None
        assert point.path == out / "lzh_1.pth", member.filename


def test_a_damaged_file_given_by_path_is_rejected(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", 2)
    os.truncate(out / "lzh_1.pth", 1000)
    with pytest.raises(ModelFileError, match=r"lzh_1\.pth is not a readable checkpoint"):
        run(color_folder, out, resume=str(out / "lzh_1.pth"))


def test_a_missing_file_is_rejected_and_creates_no_directory(color_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        run(color_folder, tmp_path / "run", resume="lzh_7.pth")
    assert not (tmp_path / "run").exists()


def test_weights_without_a_training_state_are_rejected(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    save_checkpoint(path, load_checkpoint(plain / "lzh_0.pth")._replace(training={}))
    with pytest.raises(ModelFileError, match="contains weights but no training state"):
        run(color_folder, tmp_path / "run", resume=str(path))
    torch.save(get_architecture("lzh").build(3).state_dict(), path)
    with pytest.raises(ModelFileError, match="contains no training state: start a new run without --resume"):
        run(color_folder, tmp_path / "run", resume=str(path))


@pytest.mark.parametrize("part", ["optimizer", "random", "best_epoch", "epoch", "weights", "seconds", "scaler"])
def test_an_incomplete_training_state_is_rejected(color_folder: Path, plain: Path, tmp_path: Path, part: str) -> None:
    path = tmp_path / "incomplete.pth"
    checkpoint = load_checkpoint(plain / "lzh_0.pth")
    del checkpoint.training[part]
    save_checkpoint(path, checkpoint)
    with pytest.raises(ModelFileError, match=r"incomplete\.pth cannot be resumed from"):
        run(color_folder, tmp_path / "run", resume=str(path))


def test_the_weights_of_another_model_are_rejected(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    save_checkpoint(
        path, load_checkpoint(plain / "lzh_0.pth")._replace(weights=get_architecture("lzh").build(9).state_dict())
    )
    with pytest.raises(ModelFileError, match=r"other\.pth cannot be resumed from"):
        run(color_folder, tmp_path / "run", resume=str(path))


# --- a different run


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"learning_rate": 0.5}, "was trained with learning_rate 0.01, not 0.5"),
        ({"batch_size": 8}, "was trained with batch_size 16, not 8"),
        ({"momentum": 0.9}, "was trained with momentum 0.0, not 0.9"),
        ({"ema_decay": 0.9}, "was trained with ema_decay None, not 0.9"),
        ({"recipe_name": "fast"}, "was trained with name 'notes', not 'fast'"),
        ({"seed": 1}, "was trained with seed 0, not 1"),
    ],
)
def test_a_different_run_is_rejected(color_folder: Path, plain: Path, tmp_path: Path, more: Any, message: str) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", 2)
    with pytest.raises(UsageError) as caught:
        run(color_folder, out, resume="auto", **more)
    assert message in caught.value.problem
    assert sorted(path.name for path in out.glob("*.pth")) == ["lzh_0.pth", "lzh_1.pth"]


def test_another_model_is_rejected(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was trained with the model lzh, not fastnet"):
        run(color_folder, tmp_path / "run", model="fastnet", resume=str(plain / "lzh_0.pth"))


def test_another_image_size_is_rejected(color_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": str(color_folder), "device": "cpu", "epochs": 1, "out": tmp_path / "run"}
    train("fastnet", **options, image_size=16)
    with pytest.raises(UsageError, match=r"fastnet_0\.pth was trained with image size 16x16, not 20x20"):
        train("fastnet", **options, image_size=20, resume="auto")


def test_other_data_is_rejected(plain: Path, tmp_path: Path) -> None:
    other = write_image_folder(tmp_path / "colors", seed=1)
    with pytest.raises(UsageError, match=r"was trained with training data .*, not "):
        run(other, tmp_path / "run", resume=str(plain / "lzh_0.pth"))


def test_the_same_recipe_by_name_or_by_values_is_the_same_run(
    color_folder: Path, scheduled: Path, tmp_path: Path
) -> None:
    overrides: list[dict[str, Any]] = [{"recipe_name": "fast", "ema_decay": 0.9}, {"momentum": 0.9}, {}]
    for number, more in enumerate(overrides):
        out = copy_checkpoints(scheduled, tmp_path / str(number), 1)
        run(color_folder, out, epochs=2, resume="auto", **more)
        assert_same_file(out / "lzh_1.pth", scheduled / "lzh_1.pth")


# --- a different end of the run


def test_a_run_keeps_what_its_device_decided(color_folder: Path, scheduled: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(scheduled, tmp_path / "run", 1)
    loaded = load_checkpoint(out / "lzh_0.pth")
    assert loaded.spec.training is not None
    assert (loaded.spec.training.recipe["precision"], loaded.spec.training.recipe["channels_last"]) == ("fp32", False)
    recipe = {**loaded.spec.training.recipe, "precision": "bf16", "channels_last": True}  # as recorded on a GPU
    record = msgspec.structs.replace(loaded.spec.training, recipe=recipe)
    spec = msgspec.structs.replace(loaded.spec, training=record)
    save_checkpoint(out / "lzh_0.pth", loaded._replace(spec=spec))
    options = {"epochs": 2, "recipe_name": "fast", "ema_decay": 0.9, "resume": "auto"}
    run(color_folder, out, **options, precision="auto")
    resumed = load_checkpoint(out / "lzh_1.pth").spec.training
    assert resumed is not None
    assert resumed.recipe == recipe
    with pytest.raises(UsageError, match="was trained with precision 'bf16', not 'fp32'"):
        run(color_folder, out, **options)


def test_extending_a_constant_schedule_gives_the_weights_of_the_longer_run(
    color_folder: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(color_folder, out, epochs=1)
    done = run(color_folder, out, epochs=3, resume="auto")
    assert done.epochs == 3
    assert_same_file(out / "lzh_2.pth", plain / "lzh_2.pth")


def test_extending_a_schedule_issues_a_warning(color_folder: Path, scheduled: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(scheduled, tmp_path / "run", 2)
    with pytest.warns(
        FallbackWarning, match="changing epochs from 2 to 3 stretches the learning rate schedule from this point on"
    ):
        done = run(color_folder, out, epochs=3, resume="auto")
    assert done.epochs == 3
    record = load_checkpoint(out / "lzh_2.pth").spec.training
    assert record is not None
    assert msgspec.to_builtins(record.recipe)["epochs"] == 3


def test_the_number_of_epochs_defaults_to_that_of_the_run(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", 1)
    assert train("lzh", data=str(color_folder), device="cpu", out=out, resume="auto").epochs == 3


def test_patience_can_stop_a_resumed_run(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    out = copy_checkpoints(plain, tmp_path / "run", 3)
    best = load_checkpoint(out / "lzh_2.pth").training["best_epoch"]
    done = run(color_folder, out, epochs=9, patience=1, resume="auto")
    assert done.stop_reason
    assert done.epochs <= max(best + 2, 9)


def test_the_time_limit_counts_from_the_start_of_the_run(color_folder: Path, plain: Path, tmp_path: Path) -> None:
    """A run of two hours that resumes with `max_minutes` 60 stops after one step and saves it."""
    path = tmp_path / "run" / "lzh_0.pth"
    checkpoint = load_checkpoint(plain / "lzh_0.pth")
    save_checkpoint(path, checkpoint._replace(training={**checkpoint.training, "seconds": 7200.0}))
    done = run(color_folder, path.parent, max_minutes=60, resume="auto")
    assert done.stop_reason
    assert load_checkpoint(path.parent / "lzh_interrupted.pth").training["done"] == 1
    # Without the limit it resumes to the weights of the run that had none.
    run(color_folder, path.parent, resume="auto", max_minutes=600)
    resumed, expected = load_checkpoint(path.with_name("lzh_2.pth")), load_checkpoint(plain / "lzh_2.pth")
    assert deep_equal(resumed.weights, expected.weights)


# --- TensorBoard


class FailAfterStep(Callback):
    """Raises an error after a step, which is later than the last checkpoint."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, step: int) -> None:
        if step == self._step:
            raise RuntimeError(step)


def test_the_scalars_continue_without_gaps_and_duplicates(color_folder: Path, tmp_path: Path) -> None:
    """There are 60 steps per epoch. The loss logged at step 200, after the checkpoint of step 180, is replaced."""
    more: dict[str, Any] = {"batch_size": 1, "epochs": 4, "learning_rate": 0.001}
    with pytest.raises(RuntimeError, match="205"):
        run(color_folder, tmp_path / "run", callbacks=[FailAfterStep(205)], **more)
    run(color_folder, tmp_path / "run", resume="auto", **more)
    run(color_folder, tmp_path / "whole", **more)
    found, expected = read_scalars(tmp_path / "run" / "logs"), read_scalars(tmp_path / "whole" / "logs")
    assert [step for step, _ in found["train_loss"]] == [100, 200]
    assert found["train_loss"] == expected["train_loss"]
    for name in ("test_loss", "accuracy"):
        assert [step for step, _ in found[name]] == [0, 1, 2, 3], name
        assert found[name] == expected[name]


def read_scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values that TensorBoard reads from all files of the directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(logs))
    read.Reload()
    return {name: [(point.step, point.value) for point in read.Scalars(name)] for name in read.Tags()["scalars"]}
