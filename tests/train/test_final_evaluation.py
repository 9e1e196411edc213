"""What a run does with a val split, and how it tests and calibrates its result."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifarx_serve.errors import FallbackWarning, UsageError
from cifarx_serve.spec import InputSpec, ModelSpec, TrainingRecord
from cifarx_train import calibration, run_data
from cifarx_train.callbacks.base import Callback, EpochReport, FinalReport, RunInfo
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.data.dataset import Split
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.selection import select_dataset
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluator
from cifarx_train.train import train
from cifarx_train.trainer import TrainResult
from tests.support.image_datasets import COLORS, color_image

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, "momentum": 0.5, "device": "cpu"}
COUNTS = {"train": 40, "val": 20, "test": 15}


class RecordingCallback(Callback):
    """Records the events it receives."""

    def __init__(self) -> None:
        self.runs: list[RunInfo] = []
        self.epochs: list[EpochReport] = []
        self.finals: list[FinalReport] = []

    def on_train_start(self, run: RunInfo) -> None:
        self.runs.append(run)

    def on_epoch_end(self, report: EpochReport) -> None:
        self.epochs.append(report)

    def on_test_end(self, report: FinalReport) -> None:
        self.finals.append(report)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three splits of three classes, in which every fifth image has the color of the next class."""
    folder, rng, colors = tmp_path_factory.mktemp("drawn") / "colors", np.random.default_rng(0), list(COLORS.values())
    for split, count in COUNTS.items():
        for label, name in enumerate(COLORS):
            directory = folder / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                color = colors[(label + (number % 5 == 0)) % len(colors)]
                Image.fromarray(color_image(color, rng)).save(directory / f"{number}.png")
    return folder


@pytest.fixture
def few_images_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MIN_IMAGES", 10)
    monkeypatch.setattr(run_data, "MIN_IMAGES", 10)


def run(data: Path, out: Path, **options: Any) -> TrainResult:
    return train("lzh", data=str(data), out=out, **{**OPTIONS, **options})


def spec_of(path: Path) -> ModelSpec:
    return load_checkpoint(path).spec


def record_of(path: Path) -> TrainingRecord:
    record = spec_of(path).training
    assert record is not None
    return record


def accuracy_on(split: Split, path: Path, data: Path) -> float:
    images, cpu = select_dataset(str(data)).load(split, InputSpec(height=32, width=32)), torch.device("cpu")
    evaluator = Evaluator(DeviceLoader(images, cpu), InputSpec(height=32, width=32), 3, cpu, Distributed())
    return evaluator.evaluate(load_checkpoint(path).build()).accuracy


def test_epochs_are_compared_on_val_and_the_best_is_tested_once(data: Path, tmp_path: Path) -> None:
    callback = RecordingCallback()
    done = run(data, tmp_path, callbacks=[callback])
    [start], [final] = callback.runs, callback.finals
    assert start.val_set is not None
    assert (len(start.val_set), len(start.test_set), start.num_train_images) == (60, 45, 120)
    paths = [tmp_path / f"lzh_{epoch}.pth" for epoch in range(3)]
    for report, path in zip(callback.epochs, paths, strict=True):
        assert report.evaluation.accuracy == record_of(path).val_accuracy == accuracy_on("val", path, data)
        assert report.evaluation.confusion_matrix.sum() == 60
    val_accuracies = [report.evaluation.accuracy for report in callback.epochs]
    best = val_accuracies.index(max(val_accuracies))
    assert (final.checkpoint, final.epoch, final.val_accuracy) == (paths[best], best, max(val_accuracies))
    assert done.best == (paths[best], max(val_accuracies))
    assert done.final == final
    assert final.evaluation.confusion_matrix.sum() == 45
    assert done.test_accuracy == final.evaluation.accuracy == accuracy_on("test", paths[best], data)
    recorded = [record_of(path).test_accuracy for path in paths]
    assert recorded == [done.test_accuracy if epoch == best else None for epoch in range(3)]
    assert (record_of(paths[0]).data.val_images, record_of(paths[0]).data.test_images) == (60, 45)


@pytest.mark.slow
def test_a_finished_run_with_a_val_split_is_left_unchanged(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path, keep=1)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.pth")}
    callback = RecordingCallback()
    again = run(data, tmp_path, keep=1, resume="auto", callbacks=[callback])
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.pth")} == before
    assert callback.runs[0].resumed_from == tmp_path / "lzh_2.pth"
    assert (again.test_accuracy, again.best, again.epochs) == (first.test_accuracy, first.best, 3)
    assert again.final.checkpoint == first.final.checkpoint


@pytest.mark.slow
def test_a_resumed_run_knows_its_best_epoch_on_val(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-12, "momentum": 0}
    run(data, tmp_path / "run", **options, epochs=2)
    longer = run(data, tmp_path / "run", **options, epochs=4, resume="auto")
    assert longer.final.checkpoint == tmp_path / "run" / "lzh_0.pth"
    assert longer.test_accuracy == accuracy_on("test", longer.final.checkpoint, data)
    # In another directory the best epoch has no checkpoint: the result is that of the last one.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lzh_0.pth").write_bytes(b"of another run")
    elsewhere = run(data, tmp_path / "elsewhere", **options, epochs=4, resume=str(tmp_path / "run" / "lzh_1.pth"))
    assert elsewhere.final.checkpoint == tmp_path / "elsewhere" / "lzh_3.pth"
    assert (tmp_path / "elsewhere" / "lzh_0.pth").read_bytes() == b"of another run"


def test_patience_is_about_the_val_split(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path, epochs=9, learning_rate=1e-12, momentum=0, patience=1)
    assert done.stop_reason == "val accuracy has not improved since epoch 1 (patience 1)"
    assert done.final.checkpoint == tmp_path / "lzh_0.pth"


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_val_images(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", epochs=1)
    other = tmp_path / "other"
    shutil.copytree(data, other, ignore=shutil.ignore_patterns("val"))
    with pytest.raises(UsageError, match=r"was trained with val data [0-9a-f]{12}, not None"):
        run(other, tmp_path / "run", resume="auto")


@pytest.mark.usefixtures("few_images_suffice")
def test_the_temperature_is_fitted_to_val_and_recorded(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path, calibrate=True, epochs=1)
    fitted = done.final.calibration
    assert fitted is not None
    assert (fitted.images, fitted.source) == (60, "val")
    assert spec_of(done.final.checkpoint).temperature == fitted.temperature


@pytest.mark.slow
@pytest.mark.usefixtures("few_images_suffice")
def test_a_calibrated_run_trains_the_same_weights(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path, calibrate=True)
    others = [path for path in done.checkpoints if path != done.final.checkpoint]
    assert [spec_of(path).temperature for path in others] == [None, None]
    plain = run(data, tmp_path / "plain")
    weights, expected = load_checkpoint(done.final.checkpoint).weights, load_checkpoint(plain.final.checkpoint).weights
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert run(data, tmp_path, calibrate=True, resume="auto").final.calibration == done.final.calibration


@pytest.mark.slow
@pytest.mark.usefixtures("few_images_suffice")
def test_training_images_are_held_out_where_there_is_no_val_split(data: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    shutil.copytree(data, two, ignore=shutil.ignore_patterns("val"))
    callback = RecordingCallback()
    done = run(two, tmp_path / "run", calibrate=True, epochs=2, callbacks=[callback])
    fitted = done.final.calibration
    assert fitted is not None
    assert (fitted.images, fitted.source) == (12, "train")
    assert done.final.checkpoint == tmp_path / "run" / "lzh_1.pth"
    assert spec_of(done.final.checkpoint).temperature == fitted.temperature
    start = callback.runs[0]
    assert (start.num_train_images, start.num_calibration_images, start.class_counts) == (108, 12, (36, 36, 36))
    assert start.total_steps == 2 * 7
    (tmp_path / "run" / "lzh_1.pth").unlink()
    again = run(two, tmp_path / "run", calibrate=True, epochs=2, resume="auto")
    assert again.final.calibration == fitted


def test_too_few_images_to_calibrate_stop_a_run_before_it_starts(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--calibrate needs at least 100 images, but the val split has only 60"):
        run(data, tmp_path / "run", calibrate=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("few_images_suffice")
def test_a_model_without_a_temperature_is_not_calibrated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_LOWEST", 19.0)
    with pytest.warns(
        FallbackWarning, match=r"lzh_0\.pth is not calibrated: the loss still falls at a temperature of 19"
    ):
        done = run(data, tmp_path, calibrate=True, epochs=1)
    assert done.final.calibration is None
    assert spec_of(done.final.checkpoint).temperature is None
