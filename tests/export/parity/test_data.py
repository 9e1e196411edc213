"""The images of the parity check: the dataset the model was trained on, or the one given."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_export.parity import data as data_module
from cifarx_export.parity.data import load_parity_data, load_training_images, name_classes
from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.data.dataset import Dataset, LabeledImages, Picture, Split
from cifarx_train.data.selection import select_dataset
from cifarx_train.data.synthetic.dataset import CLASS_NAMES


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> ModelSpec:
    return load_checkpoint(checkpoint).spec


def trained_on(spec: ModelSpec, **changes: object) -> ModelSpec:
    assert spec.training is not None
    record = msgspec.structs.replace(spec.training.data, **changes)
    return msgspec.structs.replace(spec, training=msgspec.structs.replace(spec.training, data=record))


def test_auto_is_the_test_split_of_the_training_data(spec: ModelSpec) -> None:
    data = load_parity_data(spec, "auto")
    assert spec.training is not None
    assert (data.name, data.fingerprint) == (spec.training.data.name, spec.training.data.test_fingerprint)
    assert data.images.shape == (spec.training.data.test_images, 32, 32, 3)
    assert data.images.dtype == np.uint8
    assert data.labels is not None
    assert data.labels.shape == (len(data.images),)


def test_a_folder_is_read_completely_and_named_after_itself(spec: ModelSpec, image_folder: Path) -> None:
    data = load_parity_data(spec, str(image_folder))
    files = sorted(image_folder.glob("test/*/*"))
    assert data.name == image_folder.name  # not its path: the name is stored inside the artifact
    assert data.images.shape == (len(files), 32, 32, 3)
    assert data.labels is not None
    assert [spec.class_names[label] for label in data.labels] == [file.parent.name for file in files]


def test_auto_uses_the_environment_variable(
    spec: ModelSpec, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFARX_DATA", str(image_folder))
    assert load_parity_data(spec, "auto").name == image_folder.name


def test_images_have_the_models_size(spec: ModelSpec, image_folder: Path) -> None:
    wide = msgspec.structs.replace(spec, input=InputSpec(height=16, width=24))
    assert load_parity_data(wide, str(image_folder)).images.shape[1:] == (16, 24, 3)
    assert load_parity_data(wide, "builtin").images.shape[1:] == (16, 24, 3)


def test_there_are_no_labels_for_other_classes(
    spec: ModelSpec, relabeled_image_folder: Path, image_folder: Path
) -> None:
    other = load_parity_data(spec, str(relabeled_image_folder))
    assert other.labels is None
    same = load_parity_data(spec, str(image_folder))
    assert np.array_equal(other.images, same.images)
    assert other.fingerprint != same.fingerprint


def test_labels_follow_the_names_of_the_classes(spec: ModelSpec, image_folder: Path) -> None:
    same = load_parity_data(spec, str(image_folder)).labels
    assert same is not None
    reordered = msgspec.structs.replace(spec, class_names=spec.class_names[::-1])
    labels = load_parity_data(reordered, str(image_folder)).labels
    assert labels is not None
    assert np.array_equal(labels, 9 - same)
    more = msgspec.structs.replace(spec, class_names=("zebra", *spec.class_names))
    labels = load_parity_data(more, str(image_folder)).labels
    assert labels is not None
    assert np.array_equal(labels, same + 1)


def test_there_are_no_labels_if_a_class_is_missing_or_ambiguous(spec: ModelSpec, image_folder: Path) -> None:
    for names in (spec.class_names[1:], ("another", *spec.class_names[1:]), (*spec.class_names, spec.class_names[0])):
        other = msgspec.structs.replace(spec, class_names=names)
        assert load_parity_data(other, str(image_folder)).labels is None


# Class names of the data, for a network whose names nobody stated.


def unnamed(spec: ModelSpec, classes: int = 10) -> ModelSpec:
    names = tuple(f"class {index}" for index in range(classes))
    return msgspec.structs.replace(spec, class_names=names, assumed=("class_names", "preprocessing"), training=None)


def test_a_dataset_that_is_named_states_the_class_names(spec: ModelSpec, image_folder: Path) -> None:
    named = name_classes(unnamed(spec), str(image_folder))
    assert (named.class_names, named.assumed) == (spec.class_names, ("preprocessing",))


def test_class_names_stay_assumed_where_the_dataset_does_not_state_them(
    spec: ModelSpec, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nine = unnamed(spec, classes=9)
    assert name_classes(nine, str(image_folder)) == nine
    monkeypatch.setenv("CIFARX_DATA", str(image_folder))
    for stand_in in ("builtin", "auto"):
        assert name_classes(unnamed(spec), stand_in) == unnamed(spec)


def test_stated_class_names_are_kept(spec: ModelSpec, relabeled_image_folder: Path) -> None:
    assert name_classes(spec, str(relabeled_image_folder)) == spec


@pytest.mark.parametrize("name", ["nowhere", "buildin"])
def test_missing_data_is_an_error(spec: ModelSpec, name: str) -> None:
    with pytest.raises(DataError, match=name):
        load_parity_data(spec, name)


def test_the_drawings_never_stand_in_for_a_folder(spec: ModelSpec) -> None:
    with pytest.raises(DataError, match="trained on my photographs, whose path is not known: give it with --data PATH"):
        load_parity_data(trained_on(spec, kind="folder", name="my photographs"), "auto")


def test_the_drawings_stand_in_for_cifar10_with_a_warning(spec: ModelSpec) -> None:
    with pytest.warns(FallbackWarning, match="BUILT-IN DRAWINGS, not photographs"):
        data = load_parity_data(trained_on(spec, kind="cifar10", name="CIFAR-10"), "auto")
    assert data.warnings() == (f"the images are the {data.name}, and not like those that the network was trained on",)


def test_drawings_that_the_user_names_are_marked_unless_the_network_was_trained_on_them(spec: ModelSpec) -> None:
    assert not load_parity_data(spec, "builtin").warnings()
    for other in (trained_on(spec, kind="folder", name="my photographs"), unnamed(spec)):
        assert load_parity_data(other, "builtin").stands_in


# Training images join a small test split.


class NumberedDataset(Dataset):
    """Images that contain their number: those of the test split from 0, and those of the training split from 10,000."""

    kind = "folder"
    name = "numbered"

    def __init__(self, test: int, train: int) -> None:
        self._sizes = {"test": test, "train": train}

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    def sample(self, split: Split, count: int) -> list[Picture]:
        raise NotImplementedError(split, count)

    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        del spec
        numbers = np.arange(self._sizes[split]) + (10_000 if split == "train" else 0)
        images = np.stack([numbers // 256, numbers % 256, numbers % 256], axis=1).astype(np.uint8)[:, None, None]
        return LabeledImages(images, numbers % 10)


def numbers(images: NDArray[np.uint8]) -> list[int]:
    return [256 * int(high) + int(low) for high, low, _ in images[:, 0, 0]]


@pytest.mark.parametrize(
    ("test", "train", "joined"),
    [(1000, 50, 0), (999, 50, 1), (412, 5000, 588), (412, 100, 100), (5, 0, 0), (1, 3, 3)],
)
def test_training_images_join_up_to_a_thousand(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, test: int, train: int, joined: int
) -> None:
    monkeypatch.setattr(data_module, "select_dataset_for_model", lambda *_: NumberedDataset(test, train))
    data = load_parity_data(spec, "numbered")
    assert (data.test_images, len(data.training_rows)) == (test, joined)
    expected = [*range(test), *(10_000 + row for row in data.training_rows)]
    assert numbers(data.images) == expected
    assert data.labels is not None
    assert data.labels.tolist() == [number % 10 for number in expected]
    whole = f"{test:,} images of numbered"
    assert data.describe() == (f"{test:,} test and {joined} training images of numbered" if joined else whole)
    assert bool(data.warnings()) is (test + joined < 100)


@pytest.mark.parametrize(
    ("test", "train", "shared"),
    [(1000, 50, False), (900, 400, False), (900, 300, True), (100, 2000, False), (5, 40, True)],
)
def test_calibration_images_are_no_images_of_the_check_if_enough_others_are_left(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, test: int, train: int, shared: bool
) -> None:
    monkeypatch.setattr(data_module, "select_dataset_for_model", lambda *_: NumberedDataset(test, train))
    data = load_parity_data(spec, "numbered")
    taken = load_training_images(spec, "numbered", 2000, checked=data)
    assert data.shares_calibration is shared
    assert bool(set(numbers(taken)) & set(numbers(data.images))) is shared
    assert len(taken) == (train if shared else train - len(data.training_rows))


# Calibration images for int8: from the training split, never from the split of the parity check.


@pytest.mark.parametrize("count", [1, 7, 100])
def test_training_images_are_spread_over_the_training_split(spec: ModelSpec, count: int) -> None:
    whole = select_dataset("builtin").load("train", spec.input).images
    taken = load_training_images(spec, "builtin", count)
    assert (taken.shape, taken.dtype) == ((count, 32, 32, 3), np.uint8)
    assert np.array_equal(taken[0], whole[0])
    if count > 1:
        assert np.array_equal(taken[-1], whole[-1])
        assert np.array_equal(taken[1], whole[round((len(whole) - 1) / (count - 1))])


def test_all_training_images_are_returned_if_there_are_fewer(spec: ModelSpec, image_folder: Path) -> None:
    taken = load_training_images(spec, str(image_folder), 100)
    files = sorted(image_folder.glob("train/*/*"))
    assert len(taken) == len(files) < 100
    assert np.array_equal(taken, select_dataset(str(image_folder)).load("train", spec.input).images)


def test_training_images_are_not_images_of_the_parity_check(spec: ModelSpec) -> None:
    checked = {image.tobytes() for image in load_parity_data(spec, "builtin").images}
    assert not any(image.tobytes() in checked for image in load_training_images(spec, "builtin", 512))
