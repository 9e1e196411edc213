from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, file_sha256, save_checkpoint
from cifarx_train.distillation import Teacher, complete_recipe, open_teacher
from cifarx_train.models.registry import get_architecture
from cifarx_train.recipes import load_recipe
from tests.support.color_model import SPEC as COLORS
from tests.support.color_model import write_onnx

CPU = torch.device("cpu")


def random_images(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8))


def save_lzh(path: Path, names: tuple[str, ...], **fields: Any) -> Path:
    torch.manual_seed(0)
    architecture = get_architecture("lzh")
    spec = ModelSpec(model="lzh", class_names=names, input=architecture.input, source=architecture.source)
    module = architecture.build(len(names))
    save_checkpoint(path, Checkpoint(msgspec.structs.replace(spec, **fields), module.state_dict(), {}))
    return path


def test_a_checkpoint_answers_as_in_the_backend(tmp_path: Path) -> None:
    size = InputSpec(height=32, width=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), color="BGR")
    path = save_lzh(tmp_path / "t.pth", ("a", "b", "c"), input=size)
    images = random_images(5, 32, 32)
    teacher = Teacher(path, ("a", "b", "c"), CPU)
    with open_backend(path, device="cpu") as backend:
        expected = backend.run(model_input(images.numpy(), backend.spec))
    np.testing.assert_allclose(teacher.logits(images).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert teacher.runs_on_device
    assert not teacher.logits(images).requires_grad


def test_an_artifact_answers_for_images_of_its_own_size(tmp_path: Path) -> None:
    teacher = Teacher(write_onnx(tmp_path / "colors.onnx"), COLORS.class_names, CPU)
    images = random_images(3, 4, 6)
    np.testing.assert_allclose(teacher.logits(images).numpy(), images.float().mean((1, 2)) / 25.5, atol=1e-5)
    assert not teacher.runs_on_device


def test_images_of_another_size_are_resized_as_a_whole(tmp_path: Path) -> None:
    teacher = Teacher(write_onnx(tmp_path / "colors.onnx"), COLORS.class_names, CPU)
    images = random_images(3, 16, 16)
    np.testing.assert_allclose(teacher.logits(images).numpy(), images.float().mean((1, 2)) / 25.5, atol=0.1)


def test_grayscale_and_color_are_converted(tmp_path: Path) -> None:
    teacher = Teacher(write_onnx(tmp_path / "colors.onnx"), COLORS.class_names, CPU)
    gray = random_images(2, 4, 6, channels=1)
    expected = gray.float().mean((1, 2)).expand(-1, 3) / 25.5
    np.testing.assert_allclose(teacher.logits(gray).numpy(), expected, atol=1e-5)


def test_a_checkpoint_that_does_not_say_its_network_is_exported_first(tmp_path: Path) -> None:
    torch.save(get_architecture("lzh").build(2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        UsageError, match=r"the teacher .*weights.pt cannot be opened \(.*without their network.*: export it"
    ):
        Teacher(tmp_path / "weights.pt", ("a", "b"), CPU)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    path = save_lzh(tmp_path / "t.pth", ("a", "b", "c", "d"))
    images = random_images(2, 32, 32)
    everything = Teacher(path, ("a", "b", "c", "d"), CPU).logits(images)
    assert torch.equal(Teacher(path, ("d", "b"), CPU).logits(images), everything[:, [3, 1]])
    with pytest.raises(UsageError) as caught:
        Teacher(path, ("a", "cat", "dog"), CPU)
    assert str(caught.value) == (
        f"the teacher {path} does not know 2 of 3 classes (cat, dog): give a teacher with the classes of the data"
    )


def test_probabilities_and_one_logit_for_two_classes(tmp_path: Path) -> None:
    images, names = random_images(2, 32, 32), ("a", "b")
    logits = Teacher(save_lzh(tmp_path / "logits.pth", names), names, CPU).logits(images)
    probabilities = Teacher(save_lzh(tmp_path / "p.pth", names, output="probabilities"), names, CPU).logits(images)
    torch.testing.assert_close(probabilities, logits.clamp_min(torch.finfo(torch.float32).tiny).log())
    torch.manual_seed(0)
    one = get_architecture("lzh").build(1)
    size = InputSpec(height=32, width=32)
    spec = ModelSpec(model="lzh", class_names=names, input=size, activation="sigmoid", outputs=1)
    save_checkpoint(tmp_path / "one.pth", Checkpoint(spec, one.state_dict(), {}))
    found = Teacher(tmp_path / "one.pth", ("b", "a"), CPU).logits(images)
    expected = one(images.permute(0, 3, 1, 2) / 255).sigmoid()[:, 0]  # of the second class
    torch.testing.assert_close(found.softmax(1)[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_with_several_labels_is_refused(tmp_path: Path) -> None:
    document = msgspec.structs.replace(COLORS, activation="sigmoid").to_json()
    with pytest.raises(UsageError, match="gives an image several labels: give a teacher with one label per image"):
        Teacher(write_onnx(tmp_path / "s.onnx", document), COLORS.class_names, CPU)


def test_the_teacher_is_reported(tmp_path: Path) -> None:
    path, lines = write_onnx(tmp_path / "colors.onnx"), list[str]()
    teacher = open_teacher(path, COLORS.class_names, CPU, None, lines.append)
    assert teacher is not None
    assert (teacher.record.name, teacher.record.sha256) == ("colors.onnx", file_sha256(path))
    assert lines == [
        "teacher colors.onnx (colors): 3 classes (red, green, blue), images resized to RGB 4x6, stretch, bilinear, "
        "not normalized"
    ]
    assert open_teacher(None, COLORS.class_names, CPU, None, lines.append) is None
    with pytest.raises(ModelFileError, match="no such file"):
        open_teacher(tmp_path / "absent.onnx", COLORS.class_names, CPU, None, lines.append)


def test_the_recipe_has_defaults_for_a_teacher_only() -> None:
    plain = load_recipe("notes")
    assert complete_recipe(plain, has_teacher=False) == plain
    complete = complete_recipe(plain, has_teacher=True)
    assert (complete.distillation_weight, complete.distillation_temperature) == (0.9, 2.0)
    given = load_recipe("notes", overrides={"distillation_weight": 0.0})
    assert complete_recipe(given, has_teacher=True).distillation_weight == 0
    with pytest.raises(UsageError, match="distillation_weight needs a teacher: give one with --teacher FILE"):
        complete_recipe(given, has_teacher=False)
