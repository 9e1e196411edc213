"""The drawings: they never change, and neither their mean color nor a linear model solves the task."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_train.data.synthetic.dataset import CLASS_NAMES, TEST_IMAGES, TRAIN_IMAGES, draw_split

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]

CLASSES = 10
# The SHA-256 of the images and labels of "train", then "test". If it changed, earlier results could not be compared.
FINGERPRINT = "b47858ff10af2faf8c56815e1a94a29818aa002fb58a8cc95616413cd2f69c6c"


@pytest.fixture(scope="module")
def train_split() -> Split:
    return draw_split("train")


@pytest.fixture(scope="module")
def test_split() -> Split:
    return draw_split("test")


def image_digests(images: NDArray[np.uint8]) -> set[bytes]:
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def accuracy(scores: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def test_classes_are_those_of_cifar10() -> None:
    assert CLASS_NAMES == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )


@pytest.mark.parametrize(("name", "count"), [("train", TRAIN_IMAGES), ("test", TEST_IMAGES)])
def test_shapes_dtypes_and_balance(name: str, count: int, request: pytest.FixtureRequest) -> None:
    images, labels = request.getfixturevalue(f"{name}_split")
    assert images.shape == (count, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert labels.shape == (count,)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [count // CLASSES] * CLASSES


def test_labels_are_shuffled(train_split: Split) -> None:
    _, labels = train_split
    repeats = float((labels[1:] == labels[:-1]).mean())
    assert 0.08 < repeats < 0.12


@pytest.mark.parametrize("name", ["train", "test"])
def test_drawing_twice_returns_the_same_data(name: Literal["train", "test"], request: pytest.FixtureRequest) -> None:
    images, labels = request.getfixturevalue(f"{name}_split")
    again, labels_again = draw_split(name)
    assert again.tobytes() == images.tobytes()
    assert labels_again.tobytes() == labels.tobytes()


def test_the_drawings_never_change(train_split: Split, test_split: Split) -> None:
    digest = hashlib.sha256()
    for images, labels in (train_split, test_split):
        digest.update(images.tobytes())
        digest.update(labels.astype("<i8").tobytes())
    assert digest.hexdigest() == FINGERPRINT


def test_images_are_unique(train_split: Split, test_split: Split) -> None:
    in_train, in_test = image_digests(train_split[0]), image_digests(test_split[0])
    assert len(in_train) == TRAIN_IMAGES
    assert len(in_test) == TEST_IMAGES
    assert not in_train & in_test


def test_images_of_a_class_vary_in_every_pixel(test_split: Split) -> None:
    images, labels = test_split
    for label in range(CLASSES):
        spread = images[labels == label].std(axis=0)
        assert spread.min() > 15.0


def test_the_mean_color_does_not_predict_the_class(train_split: Split, test_split: Split) -> None:
    mean_color = train_split[0].mean(axis=(1, 2))
    centers = np.stack([mean_color[train_split[1] == label].mean(axis=0) for label in range(CLASSES)])
    distances = test_split[0].mean(axis=(1, 2))[:, None] - centers
    assert accuracy(-(distances**2).sum(axis=2), test_split[1]) < 0.15


def test_a_linear_model_is_below_half_accuracy(train_split: Split, test_split: Split) -> None:
    """Ridge regression from pixels to one-hot labels is far above chance and far from solving the task."""

    def design_matrix(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        flat = images.reshape(len(images), -1).astype(np.float32) / 255 - np.float32(0.5)
        return np.concatenate([flat, np.ones((len(flat), 1), dtype=np.float32)], axis=1)

    features = design_matrix(train_split[0])
    targets = np.eye(CLASSES, dtype=np.float32)[train_split[1]]
    gram = features.T @ features + 100 * np.eye(features.shape[1], dtype=np.float32)
    weights = np.linalg.solve(gram, features.T @ targets)
    assert 0.2 < accuracy(design_matrix(test_split[0]) @ weights, test_split[1]) < 0.5
