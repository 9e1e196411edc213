import numpy as np
import pytest
from PIL import Image

from cifarx_serve.images.preprocess import resize
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages, Split
from cifarx_train.data.synthetic.dataset import SyntheticDataset

SPEC = InputSpec(height=32, width=32)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def splits() -> dict[Split, LabeledImages]:
    data = SyntheticDataset()
    return {"train": data.load("train", SPEC), "test": data.load("test", SPEC)}


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_have_the_same_number_of_images_per_class(splits: dict[Split, LabeledImages], split: Split) -> None:
    images, labels = splits[split].images, splits[split].labels
    assert (images.shape[1:], images.dtype, labels.dtype) == ((32, 32, 3), np.uint8, np.int64)
    counts = np.bincount(labels)
    assert len(counts) == 10
    assert len(set(counts.tolist())) == 1
    assert len(images) == len(labels) == counts.sum()


def test_there_are_enough_test_images_for_a_parity_check(splits: dict[Split, LabeledImages]) -> None:
    assert len(splits["test"]) >= 1000
    assert len(splits["train"]) > len(splits["test"])


def test_images_are_unique(splits: dict[Split, LabeledImages]) -> None:
    seen = {image.tobytes() for image in splits["train"].images}
    assert len(seen) == len(splits["train"])
    assert not any(image.tobytes() in seen for image in splits["test"].images)


def test_classes_are_those_of_cifar10_and_the_name_mentions_drawings() -> None:
    data = SyntheticDataset()
    assert data.class_names == CIFAR10_CLASSES
    assert data.kind == "builtin"
    assert "drawings" in data.name


def test_loading_twice_returns_the_same_data(splits: dict[Split, LabeledImages]) -> None:
    again = SyntheticDataset().load("test", SPEC)
    assert np.array_equal(again.images, splits["test"].images)
    assert np.array_equal(again.labels, splits["test"].labels)


def test_another_size_is_resized_as_for_inference(splits: dict[Split, LabeledImages]) -> None:
    larger = InputSpec(height=40, width=48, interpolation="bicubic")
    data = SyntheticDataset().load("test", larger)
    assert data.images.shape == (len(splits["test"]), 40, 48, 3)
    assert np.array_equal(data.labels, splits["test"].labels)
    for number in (0, len(data) - 1):
        expected = resize(Image.fromarray(splits["test"].images[number]), larger)
        assert np.array_equal(data.images[number], expected)


def test_grayscale_images_have_one_channel(splits: dict[Split, LabeledImages]) -> None:
    gray = InputSpec(height=32, width=32, channels=1, color="L")
    data = SyntheticDataset().load("test", gray)
    assert data.images.shape == (len(splits["test"]), 32, 32, 1)
    assert np.array_equal(data.images[7], resize(Image.fromarray(splits["test"].images[7]), gray))
