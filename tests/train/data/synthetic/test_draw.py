"""The built-in data set: its shape, that it never changes, that colour or a linear model do not solve it."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_train.data.synthetic.draw import CLASS_NAMES, TEST_IMAGES, TRAIN_IMAGES, draw

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]

CLASSES = 10
# SHA-256 over images and labels of "train", then "test".  A change means other data: figures quoted for the
# old ones no longer hold.
FINGERPRINT = "b47858ff10af2faf8c56815e1a94a29818aa002fb58a8cc95616413cd2f69c6c"


@pytest.fixture(scope="module")
def train_split() -> Split:
    return draw("train")


@pytest.fixture(scope="module")
def test_split() -> Split:
    return draw("test")


def image_digests(images: NDArray[np.uint8]) -> set[bytes]:
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def accuracy(scores: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def test_classes_are_cifar10s_in_its_order() -> None:
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
def test_shapes_types_and_balance(name: str, count: int, request: pytest.FixtureRequest) -> None:
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
def test_drawing_twice_is_the_same(name: Literal["train", "test"], request: pytest.FixtureRequest) -> None:
    images, labels = request.getfixturevalue(f"{name}_split")
    again, labels_again = draw(name)
    assert again.tobytes() == images.tobytes()
    assert labels_again.tobytes() == labels.tobytes()


def test_fingerprint(train_split: Split, test_split: Split) -> None:
    digest = hashlib.sha256()
    for images, labels in (train_split, test_split):
        digest.update(images.tobytes())
        digest.update(labels.astype("<i8").tobytes())
    assert digest.hexdigest() == FINGERPRINT


def test_no_image_occurs_twice(train_split: Split, test_split: Split) -> None:
    in_train, in_test = image_digests(train_split[0]), image_digests(test_split[0])
    assert len(in_train) == TRAIN_IMAGES
    assert len(in_test) == TEST_IMAGES
    assert not in_train & in_test


def test_images_of_a_class_vary_everywhere(test_split: Split) -> None:
    images, labels = test_split
    for label in range(CLASSES):
        spread = images[labels == label].std(axis=0)
        assert spread.min() > 15.0


def test_mean_colour_tells_nothing_about_the_class(train_split: Split, test_split: Split) -> None:
    mean_colour = train_split[0].mean(axis=(1, 2))
    centres = np.stack([mean_colour[train_split[1] == label].mean(axis=0) for label in range(CLASSES)])
    to_centres = test_split[0].mean(axis=(1, 2))[:, None] - centres
    assert accuracy(-(to_centres**2).sum(axis=2), test_split[1]) < 0.15


def test_a_linear_model_stays_below_half(train_split: Split, test_split: Split) -> None:
    """Ridge regression from pixels to one-hot labels: far above chance, far from solving the task."""

    def design(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        flat = images.reshape(len(images), -1).astype(np.float32) / 255 - np.float32(0.5)
        return np.concatenate([flat, np.ones((len(flat), 1), dtype=np.float32)], axis=1)

    features = design(train_split[0])
    targets = np.eye(CLASSES, dtype=np.float32)[train_split[1]]
    gram = features.T @ features + 100 * np.eye(features.shape[1], dtype=np.float32)
    weights = np.linalg.solve(gram, features.T @ targets)
    assert 0.2 < accuracy(design(test_split[0]) @ weights, test_split[1]) < 0.5
