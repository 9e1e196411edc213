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
    print_ = fingerprint(data, CLASSES)
    assert len(print_) == 64
    assert set(print_) <= set("0123456789abcdef")
    assert fingerprint(LabeledImages(data.images.copy(), data.labels.copy()), CLASSES) == print_


@given(splits(), st.integers(1, 40))
def test_the_parts_that_are_hashed_at_once_do_not_count(data: LabeledImages, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cifarx_train.data.dataset._HASHED_AT_ONCE", size)
        in_parts = fingerprint(data, CLASSES)
    assert in_parts == fingerprint(data, CLASSES)


@given(splits())
def test_the_layout_in_memory_does_not_count(data: LabeledImages) -> None:
    channels_first = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2))
    view = LabeledImages(channels_first.transpose(0, 2, 3, 1), np.repeat(data.labels, 2)[::2])
    assert fingerprint(view, CLASSES) == fingerprint(data, CLASSES)


@given(splits(), st.data())
def test_a_single_pixel_counts(data: LabeledImages, choice: st.DataObject) -> None:
    images = data.images.copy()
    images.reshape(-1)[choice.draw(st.integers(0, images.size - 1))] ^= choice.draw(st.integers(1, 255))
    assert fingerprint(LabeledImages(images, data.labels), CLASSES) != fingerprint(data, CLASSES)


@given(splits(), st.data())
def test_a_single_label_counts(data: LabeledImages, choice: st.DataObject) -> None:
    labels = data.labels.copy()
    labels[choice.draw(st.integers(0, len(labels) - 1))] += 1
    assert fingerprint(LabeledImages(data.images, labels), CLASSES) != fingerprint(data, CLASSES)


@given(splits())
def test_the_order_of_the_images_counts(data: LabeledImages) -> None:
    backwards = LabeledImages(data.images[::-1], data.labels[::-1])
    assume(not np.array_equal(backwards.images, data.images))
    assert fingerprint(backwards, CLASSES) != fingerprint(data, CLASSES)


@pytest.mark.parametrize(
    "classes", [("dog", "cat", "frog"), ("cat", "dog"), ("cat", "do", "gfrog"), ("cat\0dog", "frog")]
)
def test_the_names_of_the_classes_and_their_order_count(classes: tuple[str, ...]) -> None:
    data = LabeledImages(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]))
    assert fingerprint(data, classes) != fingerprint(data, CLASSES)


def test_the_shape_of_the_images_counts() -> None:
    wide = LabeledImages(np.zeros((2, 2, 8, 3), np.uint8), np.array([0, 1]))
    tall = LabeledImages(np.zeros((2, 8, 2, 3), np.uint8), np.array([0, 1]))
    assert fingerprint(wide, CLASSES) != fingerprint(tall, CLASSES)


def test_a_fingerprint_is_the_one_that_files_already_carry() -> None:
    data = LabeledImages(np.zeros((2, 2, 2, 3), np.uint8), np.array([0, 1]))
    recorded = "4cd47964e08659164db60a3d7c167dc2f0df21544ea51742674a9dc0d6ab16b0"
    assert fingerprint(data, ("cat", "dog")) == recorded


def test_a_split_is_as_long_as_it_has_images() -> None:
    assert len(LabeledImages(np.zeros((5, 2, 2, 3), np.uint8), np.zeros(5, np.int64))) == 5
