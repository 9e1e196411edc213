"""The images of a run, checked by their pixels."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifarx_train.callbacks.tensorboard.confusion_matrix import confusion_matrix_image
from cifarx_train.callbacks.tensorboard.mistakes import mistakes_image
from cifarx_train.callbacks.tensorboard.text import shorten, text_width
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Mistake

WHITE = 255


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image.convert("RGB")).astype(np.int64)


def cell_colors(image: Image.Image, classes: int) -> NDArray[np.int64]:
    """Return the color of each cell of a confusion matrix, near its upper left corner, where there is no text."""
    seen = pixels(image)
    dark = (seen == 32).all(2)
    down, across = dark.sum(1), dark.sum(0)  # no line of text has as many dark pixels as the frame
    rows, columns = (np.flatnonzero(ink > 0.8 * ink.max())[[0, -1]] for ink in (down, across))
    side = (rows[1] - rows[0] - 1) // classes
    assert side == (columns[1] - columns[0] - 1) // classes
    inner = seen[rows[0] + 1 : rows[1], columns[0] + 1 : columns[1]]
    return inner[1::side, 1::side][:classes, :classes]


def names(classes: int) -> list[str]:
    return [f"class {number}" for number in range(classes)]


def assert_margin_is_empty(image: Image.Image) -> None:
    seen = pixels(image)
    edge = np.concatenate((seen[0], seen[-1], seen[:, 0], seen[:, -1]))
    assert (edge == WHITE).all(), "the image is cut off"


@pytest.mark.parametrize("classes", [2, 3, 10, 20, 21, 100, 300])
def test_correct_is_blue_wrong_is_red_and_empty_is_white(classes: int) -> None:
    confusion_matrix = 40 * np.eye(classes, dtype=np.int64)
    confusion_matrix[0, 1] = 40  # class 0 predicted as class 1
    image = confusion_matrix_image(confusion_matrix, names(classes))
    seen = cell_colors(image, classes)
    red, blue = seen[0, 1, 0] - seen[0, 1, 2], seen[1, 1, 2] - seen[1, 1, 0]
    assert red > 40
    assert blue > 40
    assert (seen[1, 0] == WHITE).all()
    assert seen[1, 1].sum() < seen[0, 0].sum()  # all images of a class, and half of them
    assert_margin_is_empty(image)


def test_rare_mistakes_are_visible() -> None:
    seen = cell_colors(confusion_matrix_image(np.array([[99, 1], [0, 100]]), names(2)), 2)
    assert WHITE - seen[0, 1, 1] > 15


def test_counts_are_drawn_for_up_to_20_classes() -> None:
    one, other = (np.full((20, 20), count) for count in (1, 8))  # the same fractions
    assert (pixels(confusion_matrix_image(one, names(20))) != pixels(confusion_matrix_image(other, names(20)))).any()
    one, other = (np.full((21, 21), count) for count in (1, 8))
    assert (pixels(confusion_matrix_image(one, names(21))) == pixels(confusion_matrix_image(other, names(21)))).all()


def test_cells_grow_with_the_counts() -> None:
    small, large = (confusion_matrix_image(np.full((2, 2), count), names(2)) for count in (7, 1_234_567))
    assert large.width > small.width - 1
    assert large.height > small.height + 30


def test_a_class_without_images() -> None:
    assert (cell_colors(confusion_matrix_image(np.zeros((3, 3), np.int64), names(3)), 3) == WHITE).all()


@pytest.mark.parametrize("name", ["", "two\nlines\tof it", "日本語", "a\udcffb", "x" * 500])
def test_any_class_name_can_be_drawn(name: str) -> None:
    images = LabeledImages(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64))
    assert_margin_is_empty(confusion_matrix_image(np.eye(2, dtype=np.int64), [name, "b"]))
    image = mistakes_image([Mistake(0, 1, 0.5)], images, [name, "b"])
    assert_margin_is_empty(image)
    assert image.width < 300


def noise(count: int, height: int = 32, width: int = 32) -> LabeledImages:
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return LabeledImages(images, np.arange(count) % 3)


def test_a_mistake_is_enlarged_without_interpolation() -> None:
    images = noise(3)
    seen = pixels(mistakes_image([Mistake(2, 0, 0.9)], images, names(3)))
    tile = np.repeat(np.repeat(images.images[2], 4, 0), 4, 1)
    assert (seen[12 : 12 + 128, 12 : 12 + 128] == tile).all()
    assert (seen[12 + 130 :] != WHITE).any()  # the caption


def test_a_grayscale_mistake_is_drawn_in_gray() -> None:
    images = noise(3)
    gray = LabeledImages(np.ascontiguousarray(images.images[..., :1]), images.labels)
    seen = pixels(mistakes_image([Mistake(2, 0, 0.9)], gray, names(3)))
    tile = np.repeat(np.repeat(gray.images[2], 4, 0), 4, 1)
    assert (seen[12 : 12 + 128, 12 : 12 + 128] == tile).all()


def test_mistakes_are_drawn_in_order_in_rows_of_five() -> None:
    images = noise(25)
    image = mistakes_image([Mistake(24 - place, 0, 0.9) for place in range(25)], images, names(3))
    seen = pixels(image)
    across, down = (image.width - 12) // 5, (image.height - 12) // 5
    corners = seen[12::down, 12::across][:5, :5]
    assert (corners.reshape(25, 3) == images.images[::-1, 0, 0]).all()
    assert_margin_is_empty(image)


@pytest.mark.parametrize("change", [{"predicted": 1}, {"confidence": 0.8}, {"image_index": 1}])
def test_true_class_predicted_class_and_confidence_are_drawn(change: dict[str, Any]) -> None:
    images = LabeledImages(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2))  # identical except for the class
    mistake = Mistake(0, 2, 0.9)
    plain, changed = (pixels(mistakes_image([one], images, names(3))) for one in (mistake, mistake._replace(**change)))
    assert plain.shape == changed.shape
    assert (plain != changed).any()


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 200), (129, 500), (200, 8), (1, 32)])
def test_images_of_any_size(height: int, width: int) -> None:
    image = mistakes_image([Mistake(0, 1, 0.5), Mistake(1, 2, 0.5)], noise(2, height, width), names(3))
    assert image.width < 350
    assert image.height < 250
    assert_margin_is_empty(image)


def test_no_mistakes_draws_a_message() -> None:
    assert (pixels(mistakes_image([], noise(1), names(3))) != WHITE).any()


def test_long_names_are_shortened_in_the_middle() -> None:
    short = shorten("Golden-mantled ground squirrel of the west", 13, 120)
    assert text_width(short, 13) <= 120
    assert short.startswith("Golden")
    assert short.endswith("west")
    assert shorten("cat", 13, 120) == "cat"
