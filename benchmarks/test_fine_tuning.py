"""What fine-tuning and distillation are worth on CIFAR-10 (JPEG copy), and the time to the accuracy of the notes.

`$CIFARX_DATA` is the dataset. It takes half an hour on two cores.
"""

import os
import time
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from benchmarks.support.limits import require
from benchmarks.support.notes_loop import NotesLoop
from benchmarks.support.photo_folders import write_class_folders
from cifarx_export.export import export
from cifarx_train.callbacks.base import Callback, EpochReport, RunInfo
from cifarx_train.data.dataset import Dataset
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.selection import DATA_ENV_VAR, select_dataset
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluator
from cifarx_train.models.registry import get_architecture
from cifarx_train.recipes import load_recipe
from cifarx_train.train import train
from cifarx_train.trainer import TrainResult

CPU: Final = torch.device("cpu")
SMALL_NET: Final = f"{Path(__file__).parent / 'support' / 'small_network.py'}:SmallNet"

LEAST_POINTS_OF_FINE_TUNING: Final = 8.0
LEAST_POINTS_OF_DISTILLATION: Final = 1.0
LEAST_TIMES_SOONER: Final = 12.0
NOTES_ACCURACY: Final = 0.562
"""What the loop of the notes reaches after ten epochs."""

IMAGES_PER_CLASS: Final = 100


@pytest.fixture(scope="module")
def photos() -> Dataset:
    """Return the dataset of `$CIFARX_DATA`."""
    if DATA_ENV_VAR not in os.environ:
        pytest.skip(f"set {DATA_ENV_VAR} to CIFAR-10 as image files")
    return select_dataset("auto")


def test_fine_tuning_against_training_from_scratch(photos: Dataset, tmp_path: Path, notes: list[str]) -> None:
    names = photos.class_names
    first = write_class_folders(photos, tmp_path / "first", names[:5])
    second = write_class_folders(photos, tmp_path / "second", names[5:], train_images=IMAGES_PER_CLASS)
    trained = _train(first, tmp_path / "start", recipe_name="fast", epochs=3, learning_rate=0.1)
    tuned = _train(second, tmp_path / "tuned", recipe_name="finetune", weights=str(trained.checkpoints[-1]))
    recipe = load_recipe("finetune")
    steps: dict[str, Any] = {"epochs": recipe.epochs, "batch_size": recipe.batch_size}
    scratch = {
        "finetune": _train(second, tmp_path / "scratch", recipe_name="finetune", backbone_lr="none"),
        "fast": _train(second, tmp_path / "fast", recipe_name="fast", **steps),
    }
    points = 100 * (tuned.test_accuracy - scratch["finetune"].test_accuracy)
    others = ", ".join(f"{result.test_accuracy:.2%} with {name}" for name, result in scratch.items())
    notes.append(
        f"five classes, {IMAGES_PER_CLASS} images each: fine-tuned from the other five {tuned.test_accuracy:.2%}, "
        f"from scratch {others}: {points:.1f} points with the same recipe (at least {LEAST_POINTS_OF_FINE_TUNING})"
    )
    require(points >= LEAST_POINTS_OF_FINE_TUNING, f"{points:.1f} points are under {LEAST_POINTS_OF_FINE_TUNING}")


def test_a_distilled_lzh_against_fast(photos: Dataset, tmp_path: Path, notes: list[str]) -> None:
    data = os.environ[DATA_ENV_VAR]
    teacher = _train(Path(data), tmp_path / "teacher", recipe_name="fast", epochs=4, learning_rate=0.1)
    [artifact] = export(teacher.checkpoints[-1], model=SMALL_NET, data=data)
    options: dict[str, Any] = {"data": data, "recipe_name": "fast", "epochs": 2, "device": "cpu"}
    plain = train("lzh", out=tmp_path / "plain", **options)
    distilled = train("lzh", out=tmp_path / "distilled", teacher=artifact.path, **options)
    points = 100 * (distilled.test_accuracy - plain.test_accuracy)
    notes.append(
        f"lzh, fast, {plain.epochs} epochs on {photos.name}: {plain.test_accuracy:.2%}, distilled from a teacher of "
        f"{teacher.test_accuracy:.2%} {distilled.test_accuracy:.2%}: {points:.1f} points "
        f"(at least {LEAST_POINTS_OF_DISTILLATION})"
    )
    require(points >= LEAST_POINTS_OF_DISTILLATION, f"{points:.1f} points are under {LEAST_POINTS_OF_DISTILLATION}")


def _train(data: Path, out: Path, **options: Any) -> TrainResult:
    return train(SMALL_NET, data=str(data), out=out, device="cpu", **options)


# --- time to the accuracy of the notes


class _Clock(Callback):
    """Measures the time from the first step to the end of the evaluation that reaches an accuracy."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.accuracies: list[float] = []

    def on_train_start(self, run: RunInfo) -> None:  # noqa: ARG002  the time alone matters
        self._started = time.perf_counter()

    def on_epoch_end(self, report: EpochReport) -> None:
        self.accuracies.append(report.evaluation.accuracy)
        if self.seconds is None and report.evaluation.accuracy >= NOTES_ACCURACY:
            self.seconds = time.perf_counter() - self._started


def test_time_to_the_accuracy_of_the_notes(photos: Dataset, tmp_path: Path, notes: list[str]) -> None:
    clock = _Clock()
    data = os.environ[DATA_ENV_VAR]
    ours: dict[str, Any] = {"recipe_name": "fast", "epochs": 2, "precision": "bf16"}
    train("lzh", data=data, device="cpu", out=tmp_path / "ours", callbacks=[clock], **ours)
    assert clock.seconds is not None, f"fast reached {clock.accuracies}"
    their_seconds, epochs, accuracy = _notes_time(photos, tmp_path / "notes")
    ratio = their_seconds / clock.seconds
    reached = "" if accuracy >= NOTES_ACCURACY else f", which then has only {accuracy:.2%}"
    notes.append(
        f"time to {NOTES_ACCURACY:.1%} with lzh on the CPU: fast in bf16 {clock.seconds:.1f} s "
        f"({clock.accuracies[0]:.2%} after the first of two epochs), the loop of the notes {their_seconds:.1f} s "
        f"({epochs} epochs{reached}): {ratio:.1f} times sooner (at least {LEAST_TIMES_SOONER:.0f})"
    )
    require(ratio >= LEAST_TIMES_SOONER, f"{ratio:.1f} is under {LEAST_TIMES_SOONER}")


def _notes_time(photos: Dataset, logs: Path, most_epochs: int = 15) -> tuple[float, int, float]:
    """Return the seconds and epochs that the loop of the notes takes to the accuracy, and what it then has."""
    architecture = get_architecture("lzh")
    train_images, test_images = (photos.load(split, architecture.input) for split in ("train", "test"))
    evaluator = Evaluator(
        DeviceLoader(test_images, CPU), architecture.input, len(photos.class_names), CPU, Distributed()
    )
    torch.manual_seed(0)
    module = architecture.build(len(photos.class_names))
    loop = NotesLoop(module, train_images, CPU, logs)
    steps = -(-len(train_images) // 64)
    started = time.perf_counter()
    epochs, accuracy = 0, 0.0
    while accuracy < NOTES_ACCURACY and epochs < most_epochs:
        module.train()
        loop.train(steps)
        accuracy = evaluator.evaluate(module).accuracy
        epochs += 1
    return time.perf_counter() - started, epochs, accuracy
