"""Diagnosis of a network whose preprocessing is known, from files of every kind."""

import warnings
from pathlib import Path

import msgspec
import pytest
import torch

from cifarx_export.diagnosis.diagnose import Diagnosis, diagnose
from cifarx_serve.errors import DataError, UsageError
from cifarx_train.models.options import ModelOptions, SpecOverrides
from tests.support.level_model import CLASSES, SIDE, write_level_folder, write_levels

IMAGES = 360
SIZE = ModelOptions(overrides=SpecOverrides({"input": {"height": SIDE, "width": SIDE}}))


@pytest.fixture(scope="session")
def level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_level_folder(tmp_path_factory.mktemp("data") / "trees", IMAGES // len(CLASSES))


@pytest.fixture(scope="session")
def found(level_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    path = write_levels(tmp_path_factory.mktemp("model") / "levels.onnx")
    return diagnose(path, data=str(level_folder))


def test_the_right_preprocessing_is_first(found: Diagnosis) -> None:
    best = found.trials[0]
    assert (best.accuracy, best.images, best.correct) == (1.0, IMAGES, IMAGES)
    assert (best.scaling, best.class_order) == ("ImageNet's mean and std", "sorted")
    assert (best.input.color, best.input.resize) == ("RGB", "shorter_side")
    assert found.spec.input == best.input
    assert found.spec.class_names == CLASSES
    assert (found.file, found.kind, found.data, found.classes) == ("levels.onnx", "artifact", "trees", 6)
    assert found.chance == pytest.approx(1 / 6, abs=0.01)
    assert not found.at_chance


def test_what_was_assumed_before_is_ranked_too(found: Diagnosis) -> None:
    (before,) = [trial for trial in found.trials if trial.stated]
    assert before.scaling == "0 to 1"
    assert before.accuracy < 0.6
    assert not before.tied


def test_trials_are_ranked_with_their_confidence_and_ties(found: Diagnosis) -> None:
    accuracies = [trial.accuracy for trial in found.trials]
    assert accuracies == sorted(accuracies, reverse=True)
    for trial in found.trials:
        assert trial.low <= trial.accuracy <= trial.high
        assert trial.tied or trial.accuracy < 1
    assert found.trials[0].tied
    assert all(trial.tied for trial in found.trials if trial.accuracy == 1)


def test_candidates_are_halved_while_the_images_grow(found: Diagnosis) -> None:
    images = [rung.images for rung in found.rungs]
    assert images == sorted(images)
    assert (images[0], images[-1]) == (64, IMAGES)
    assert found.rungs[0].candidates > 3 * found.rungs[-1].candidates
    assert found.rungs[-1].candidates == len(found.trials)


def test_torchscript_files_and_another_order_of_the_classes(level_folder: Path) -> None:
    order = (3, 0, 5, 1, 2, 4)
    path = write_levels(Path("levels.pt"), order)
    found = diagnose(path, model=SIZE, data=str(level_folder))
    assert found.trials[0].class_order == "assigned"
    assert found.trials[0].accuracy == 1
    assert found.spec.class_names == tuple(CLASSES[label] for label in order)


def test_stated_class_names_are_kept_if_they_are_right(level_folder: Path) -> None:
    order = (3, 0, 5, 1, 2, 4)
    names = [CLASSES[label] for label in order]
    options = ModelOptions(overrides=SpecOverrides({"class_names": names, "input": {"height": SIDE, "width": SIDE}}))
    found = diagnose(write_levels(Path("levels.pt"), order), model=options, data=str(level_folder))
    assert found.trials[0].class_order == "as stated"
    assert found.spec.class_names == tuple(names)


@pytest.mark.slow
def test_checkpoints_and_their_own_files(checkpoint: Path, good_onnx: Path) -> None:
    """A network of `cifarx train` is best as it is, or as good, even one that has learned little."""
    for path, kind in ((checkpoint, "checkpoint"), (good_onnx, "artifact")):
        found = diagnose(path, data="builtin", images=200)
        assert found.kind == kind
        first = found.trials[0]
        assert first.stated
        assert first.class_order == "as stated"


def test_weights_that_do_not_fit_are_at_chance(level_folder: Path) -> None:
    class Noise(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.sin(1e5 * images.flatten(1)[:, :6])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch has deprecated TorchScript
        torch.jit.save(torch.jit.trace(Noise(), torch.zeros(2, 3, SIDE, SIDE)), "noise.pt")
    found = diagnose("noise.pt", model=SIZE, data=str(level_folder), images=128)
    assert found.trials[0].accuracy < 0.4


def test_unusable_requests_are_refused(level_folder: Path, good_onnx: Path, checkpoint: Path) -> None:
    path = write_levels(Path("levels.pt"))
    with pytest.raises(UsageError, match="10 images are too few to tell preprocessings apart: give 64 or more"):
        diagnose(path, model=SIZE, data=str(level_folder), images=10)
    with pytest.raises(UsageError, match="contains its own spec: leave out --model"):
        diagnose(good_onnx, model=SIZE, data=str(level_folder))
    with pytest.raises(DataError, match="has 10 classes, but the network 6: use images of its classes"):
        diagnose(path, model=SIZE, data="builtin")
    from cifarx_export.formats.registry import ExportOptions
    from tests.support.conversion import write_artifact

    embedded = write_artifact(checkpoint, "onnx", Path("e.onnx"), options=ExportOptions(embed_preprocessing=True))
    with pytest.raises(UsageError, match=r"e\.onnx does its preprocessing itself: give the file that it was made from"):
        diagnose(embedded, data="builtin")


def test_broken_images_are_named_or_skipped(level_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(level_folder, tmp_path / "broken"))
    (folder / "test" / "oak" / "0000.png").write_bytes(b"not a picture")
    path = write_levels(Path("levels.pt"))
    with pytest.raises(DataError, match=r"0000\.png"):
        diagnose(path, model=SIZE, data=str(folder))
    found = diagnose(path, model=SIZE, data=str(folder), on_error="skip")
    assert found.trials[0].images == IMAGES - 1


def test_the_document_can_be_read_back(found: Diagnosis) -> None:
    assert msgspec.json.decode(msgspec.json.encode(found), type=Diagnosis) == found
