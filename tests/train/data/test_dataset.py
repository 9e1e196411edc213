import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from cifarx_train.data.dataset import LabeledImages, fingerprint

CLASSES = ("cat", "dog", "frog")


@st.composite
def splits(draw: st.DrawFn) -> LabeledImages:
    count, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    images: NDArray[np.uint8] = draw(arrays.arrays(np.uint8, (count, height, width, 3)))
    labels: NDArray[np.int64] = draw(arrays.arrays(np.int64, count, elements=st.integers(0, 2)))
    return LabeledImages(images, labels)


@given(splits())
def test_equal_data_has_equal_fingerprints(data: LabeledImages) -> None:
    digest = fingerprint(data, CLASSES)
    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")
    assert fingerprint(LabeledImages(data.images.copy(), data.labels.copy()), CLASSES) == digest


@given(splits(), st.integers(1, 40))
def test_the_chunk_size_does_not_change_the_fingerprint(data: LabeledImages, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cifarx_train.data.dataset._HASH_CHUNK", size)
        chunked = fingerprint(data, CLASSES)
    assert chunked == fingerprint(data, CLASSES)


@given(splits())
def test_the_memory_layout_does_not_change_the_fingerprint(data: LabeledImages) -> None:
    channels_first = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2))
    view = LabeledImages(channels_first.transpose(0, 2, 3, 1), np.repeat(data.labels, 2)[::2])
    assert fingerprint(view, CLASSES) == fingerprint(data, CLASSES)


@given(splits(), st.data())
def test_a_changed_pixel_changes_the_fingerprint(data: LabeledImages, choice: st.DataObject) -> None:
    images = data.images.copy()
    images.reshape(-1)[choice.draw(st.integers(0, images.size - 1))] ^= choice.draw(st.integers(1, 255))
    assert fingerprint(LabeledImages(images, data.labels), CLASSES) != fingerprint(data, CLASSES)


@given(splits(), st.data())
def test_a_changed_label_changes_the_fingerprint(data: LabeledImages, choice: st.DataObject) -> None:
    labels = data.labels.copy()
    labels[choice.draw(st.integers(0, len(labels) - 1))] += 1
    assert fingerprint(LabeledImages(data.images, labels), CLASSES) != fingerprint(data, CLASSES)


@given(splits())
def test_another_order_changes_the_fingerprint(data: LabeledImages) -> None:
    reverse = LabeledImages(data.images[::-1], data.labels[::-1])
    assume(not np.array_equal(reverse.images, data.images))
    assert fingerprint(reverse, CLASSES) != fingerprint(data, CLASSES)


@pytest.mark.parametrize(
    "classes", [("dog", "cat", "frog"), ("cat", "dog"), ("cat", "do", "gfrog"), ("cat\0dog", "frog")]
)
def test_other_class_names_change_the_fingerprint(classes: tuple[str, ...]) -> None:
    data = LabeledImages(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]))
    assert fingerprint(data, classes) != fingerprint(data, CLASSES)


def test_another_shape_changes_the_fingerprint() -> None:
    wide = LabeledImages(np.zeros((2, 2, 8, 3), np.uint8), np.array([0, 1]))
    tall = LabeledImages(np.zeros((2, 8, 2, 3), np.uint8), np.array([0, 1]))
    assert fingerprint(wide, CLASSES) != fingerprint(tall, CLASSES)


def test_the_fingerprint_is_that_of_existing_files() -> None:
    data = LabeledImages(np.zeros((2, 2, 2, 3), np.uint8), np.array([0, 1]))
    recorded = "4cd47964e08659164db60a3d7c167dc2f0df21544ea51742674a9dc0d6ab16b0"
    assert fingerprint(data, ("cat", "dog")) == recorded


def test_length_is_the_number_of_images() -> None:
    assert len(LabeledImages(np.zeros((5, 2, 2, 3), np.uint8), np.zeros(5, np.int64))) == 5
