"""Training that starts from weights or learns from a teacher, from end to end on a small dataset."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cifarx_serve.errors import CifarxError, UsageError
from cifarx_serve.spec import InputSpec, TrainingRecord
from cifarx_train.checkpoints.checkpoint import file_sha256, load_checkpoint
from cifarx_train.models.options import ModelOptions, SpecOverrides
from cifarx_train.train import train
from cifarx_train.trainer import TrainResult
from tests.support.color_model import SPEC as COLORS
from tests.support.color_model import write_onnx


def run(data: Path, out: Path, **options: Any) -> TrainResult:
    chosen = {"epochs": 1, "batch_size": 16, "learning_rate": 0.01, "device": "cpu", **options}
    return train(chosen.pop("model", "lzh"), data=str(data), out=out, **chosen)


def record_of(path: Path) -> TrainingRecord:
    record = load_checkpoint(path).spec.training
    assert record is not None
    return record


@pytest.fixture(scope="module")
def two_colors(color_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of two of the three classes."""
    folder = tmp_path_factory.mktemp("two") / "colors"
    for name in ("blue", "red"):
        for split in ("train", "test"):
            shutil.copytree(color_folder / split / name, folder / split / name)
    return folder


@pytest.fixture(scope="module")
def normalized(color_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for three classes with its own preprocessing."""
    done = run(color_folder, tmp_path_factory.mktemp("normalized"), normalize=True, epochs=2)
    return done.checkpoints[-1]


def test_a_run_starts_from_weights_for_other_classes(normalized: Path, two_colors: Path, tmp_path: Path) -> None:
    lines = list[str]()
    done = run(
        two_colors,
        tmp_path,
        weights=str(normalized),
        recipe_name="finetune",
        freeze=["model.0.*", "model.2.*"],
        progress=lines.append,
    )
    start, tuned = load_checkpoint(normalized), load_checkpoint(done.checkpoints[0])
    assert tuned.spec.class_names == ("blue", "red")
    assert tuned.spec.input == start.spec.input  # with its mean and standard deviation
    assert torch.equal(tuned.weights["model.0.weight"], start.weights["model.0.weight"])
    assert not torch.equal(tuned.weights["model.4.weight"], start.weights["model.4.weight"])
    record = record_of(done.checkpoints[0]).weights
    assert record is not None
    assert (record.name, record.sha256) == (normalized.name, file_sha256(normalized))
    assert lines == [
        f"weights {normalized.name} (sha256 {record.sha256[:12]}): 3 classes (blue, green, red)",
        "head model.8.bias, model.8.weight: new, for 2 classes (blue, red)",
        lines[2],
    ]
    assert lines[2].startswith("preprocessing RGB 32x32, stretch, bilinear, mean 0.")
    assert lines[2].endswith(f": from {normalized.name}")


def test_stated_preprocessing_wins(normalized: Path, two_colors: Path, tmp_path: Path) -> None:
    lines = list[str]()
    overrides = SpecOverrides({"input": {"mean": [0.5], "std": [0.25]}}, origins={"input": "--mean, --std"})
    options = ModelOptions("lzh", overrides=overrides)
    done = run(two_colors, tmp_path, model=options, weights=str(normalized), progress=lines.append)
    assert load_checkpoint(done.checkpoints[0]).spec.input == InputSpec(
        height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )
    assert lines[2].endswith(f", mean 0.5, std 0.25: from --mean, --std, {normalized.name}")


def test_preprocessing_that_nobody_states_is_marked(normalized: Path, two_colors: Path, tmp_path: Path) -> None:
    lines = list[str]()
    torch.save(load_checkpoint(normalized).weights, tmp_path / "weights.pt")
    run(two_colors, tmp_path / "run", weights=str(tmp_path / "weights.pt"), progress=lines.append)
    assert lines[2].endswith(": ASSUMED, state what belongs to the weights with --preprocessing")


@pytest.mark.slow
def test_a_resumed_run_does_not_read_the_weights_again(normalized: Path, two_colors: Path, tmp_path: Path) -> None:
    weights = tmp_path / "start.pth"
    shutil.copy(normalized, weights)
    options: dict[str, Any] = {"recipe_name": "finetune", "weights": str(weights)}
    whole = run(two_colors, tmp_path / "whole", **options, epochs=3)
    run(two_colors, tmp_path / "parts", **options, epochs=3, max_minutes=1e-9)
    weights.unlink()
    resumed = run(two_colors, tmp_path / "parts", **options, epochs=3, resume="auto")
    for one, other in zip(
        load_checkpoint(whole.checkpoints[-1]).weights.values(),
        load_checkpoint(resumed.checkpoints[-1]).weights.values(),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert record_of(resumed.checkpoints[-1]).weights == record_of(whole.checkpoints[-1]).weights
    with pytest.raises(UsageError, match=r"was trained with the weights start.pth, not other.pth"):
        run(two_colors, tmp_path / "parts", **{**options, "weights": "other.pth"}, epochs=4, resume="auto")


def test_random_weights_and_a_slow_backbone_are_noted(color_folder: Path, tmp_path: Path) -> None:
    lines = list[str]()
    run(color_folder, tmp_path, recipe_name="finetune", progress=lines.append)
    assert lines == ["note: the backbone learns slowly (backbone_lr) from random weights: start from trained --weights"]


@pytest.mark.slow
def test_a_run_learns_from_a_teacher(color_folder: Path, tmp_path: Path) -> None:
    teacher = write_onnx(tmp_path / "teacher.onnx")
    options: dict[str, Any] = {"teacher": teacher, "distillation_weight": 1.0, "distillation_temperature": 1.0}
    options |= {"learning_rate": 0.05, "batch_size": 8, "crop": 2}
    done = run(color_folder, tmp_path / "run", **options, epochs=5)
    assert done.test_accuracy > 0.8  # although no label had any weight
    record = record_of(done.checkpoints[-1])
    assert record.teacher is not None
    assert (record.teacher.name, record.teacher.sha256) == ("teacher.onnx", file_sha256(teacher))
    with pytest.raises(UsageError, match="distillation_weight needs a teacher: give one with --teacher"):
        run(color_folder, tmp_path / "run", epochs=6, resume="auto", **{**options, "teacher": None})
    other = write_onnx(tmp_path / "other.onnx", order=(1, 0, 2))
    with pytest.raises(UsageError, match="was trained with the teacher with sha256"):
        run(color_folder, tmp_path / "run", epochs=6, resume="auto", **{**options, "teacher": other})
    assert run(color_folder, tmp_path / "run", epochs=6, resume="auto", **options).epochs == 6


def test_the_defaults_of_a_distillation_are_resumed(color_folder: Path, tmp_path: Path) -> None:
    teacher = write_onnx(tmp_path / "teacher.onnx")
    done = run(color_folder, tmp_path, recipe_name="fast", teacher=teacher)
    assert record_of(done.checkpoints[0]).recipe["distillation_weight"] == 0.9
    assert run(color_folder, tmp_path, recipe_name="fast", teacher=teacher, resume="auto").epochs == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "absent.pth"}, "no such file absent.pth"),
        ({"weights": "default"}, "nobody publishes weights of lzh"),
        ({"teacher": Path("absent.onnx")}, "no such file absent.onnx"),
        ({"freeze": ["conv1.*"]}, "--freeze conv1.* matches no parameter: use a pattern such as 'model*'"),
        ({"freeze": ["*"]}, "--freeze * leaves nothing to train"),
        ({"distillation_weight": 0.5}, "distillation_weight needs a teacher"),
        ({"recipe_name": "fast", "model": "fastnet", "backbone_lr": 0.1}, "backbone_lr is not for the optimizer muon"),
    ],
)
def test_what_does_not_fit_together_is_an_error(
    options: dict[str, Any], words: str, color_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CifarxError) as caught:
        run(color_folder, tmp_path, **options)
    assert words in str(caught.value)
    assert caught.value.exit_status == 2
    assert not list(tmp_path.glob("*.pth"))


def test_a_teacher_needs_the_classes(two_colors: Path, color_folder: Path, tmp_path: Path) -> None:
    teacher = write_onnx(tmp_path / "teacher.onnx")
    assert set(COLORS.class_names) > {"blue", "red"}
    assert run(two_colors, tmp_path / "run", teacher=teacher).epochs == 1  # it knows more classes than these
    done = run(two_colors, tmp_path / "two")
    with pytest.raises(UsageError, match=r"does not know 1 of 3 classes \(green\)"):
        run(color_folder, tmp_path / "three", teacher=done.checkpoints[0])
