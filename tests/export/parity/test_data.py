"""The images of a proof: what the model was trained on, or what is named."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from cifarx_export.parity.data import parity_data, training_images
from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.data.selection import select_data


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> ModelSpec:
    return load_checkpoint(checkpoint).spec


def trained_on(spec: ModelSpec, **changes: object) -> ModelSpec:
    assert spec.training is not None
    record = msgspec.structs.replace(spec.training.data, **changes)
    return msgspec.structs.replace(spec, training=msgspec.structs.replace(spec.training, data=record))


def test_auto_is_the_test_split_that_the_model_was_trained_beside(spec: ModelSpec) -> None:
    data = parity_data(spec, "auto")
    assert spec.training is not None
    assert (data.name, data.fingerprint) == (spec.training.data.name, spec.training.data.test_fingerprint)
    assert data.images.shape == (spec.training.data.test_images, 32, 32, 3)
    assert data.images.dtype == np.uint8
    assert data.labels is not None
    assert data.labels.shape == (len(data.images),)


def test_a_folder_is_read_whole_and_called_by_its_name(spec: ModelSpec, pictures: Path) -> None:
    data = parity_data(spec, str(pictures))
    files = sorted(pictures.glob("test/*/*"))
    assert data.name == pictures.name  # never its path: the name travels inside the artifact
    assert data.images.shape == (len(files), 32, 32, 3)
    assert data.labels is not None
    assert [spec.class_names[label] for label in data.labels] == [file.parent.name for file in files]


def test_the_environment_names_the_data_of_auto(
    spec: ModelSpec, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFARX_DATA", str(pictures))
    assert parity_data(spec, "auto").name == pictures.name


def test_images_come_at_the_models_size(spec: ModelSpec, pictures: Path) -> None:
    wide = msgspec.structs.replace(spec, input=InputSpec(height=16, width=24))
    assert parity_data(wide, str(pictures)).images.shape[1:] == (16, 24, 3)
    assert parity_data(wide, "builtin").images.shape[1:] == (16, 24, 3)


def test_labels_of_other_classes_are_left_out(spec: ModelSpec, other_pictures: Path, pictures: Path) -> None:
    other = parity_data(spec, str(other_pictures))
    assert other.labels is None
    same = parity_data(spec, str(pictures))
    assert np.array_equal(other.images, same.images)
    assert other.fingerprint != same.fingerprint


def test_labels_of_classes_in_another_order_are_left_out(spec: ModelSpec, pictures: Path) -> None:
    reordered = msgspec.structs.replace(spec, class_names=spec.class_names[::-1])
    assert parity_data(reordered, str(pictures)).labels is None


@pytest.mark.parametrize("name", ["nowhere", "buildin"])
def test_data_that_is_asked_for_and_absent_is_an_error(spec: ModelSpec, name: str) -> None:
    with pytest.raises(DataError, match=name):
        parity_data(spec, name)


def test_auto_falls_back_aloud_where_the_folder_of_the_training_is_not_named(spec: ModelSpec) -> None:
    with pytest.warns(FallbackWarning, match="my photographs"):
        data = parity_data(trained_on(spec, kind="folder", name="my photographs"), "auto")
    assert data.name == "builtin drawings"


# The images that int8 is calibrated on: of the training split, never of the one it is proved on.


@pytest.mark.parametrize("count", [1, 7, 100])
def test_training_images_are_spread_over_the_training_split(spec: ModelSpec, count: int) -> None:
    whole = select_data("builtin").load("train", spec.input).images
    taken = training_images(spec, "builtin", count)
    assert (taken.shape, taken.dtype) == ((count, 32, 32, 3), np.uint8)
    assert np.array_equal(taken[0], whole[0])
    if count > 1:
        assert np.array_equal(taken[-1], whole[-1])
        assert np.array_equal(taken[1], whole[round((len(whole) - 1) / (count - 1))])


def test_no_more_training_images_than_there_are(spec: ModelSpec, pictures: Path) -> None:
    taken = training_images(spec, str(pictures), 100)
    files = sorted(pictures.glob("train/*/*"))
    assert len(taken) == len(files) < 100
    assert np.array_equal(taken, select_data(str(pictures)).load("train", spec.input).images)


def test_training_images_are_none_of_the_proofs(spec: ModelSpec) -> None:
    proved = {image.tobytes() for image in parity_data(spec, "builtin").images}
    assert not any(image.tobytes() in proved for image in training_images(spec, "builtin", 512))
