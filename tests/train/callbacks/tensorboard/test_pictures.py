"""What the pictures of a run show, read from their pixels."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifarx_train.callbacks.tensorboard.confusion_matrix import confusion_picture
from cifarx_train.callbacks.tensorboard.mistakes import mistakes_picture
from cifarx_train.callbacks.tensorboard.text import fitted, text_width
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Mistake

WHITE = 255


def pixels(picture: Image.Image) -> NDArray[np.int64]:
    return np.asarray(picture.convert("RGB")).astype(np.int64)


def cells(picture: Image.Image, classes: int) -> NDArray[np.int64]:
    """The colour of each cell of a confusion picture, near its upper left corner, where no number stands."""
    seen = pixels(picture)
    dark = (seen == 32).all(2)
    down, across = dark.sum(1), dark.sum(0)  # no letters have as much ink in a line as the frame has
    rows, columns = (np.flatnonzero(ink > 0.8 * ink.max())[[0, -1]] for ink in (down, across))
    side = (rows[1] - rows[0] - 1) // classes
    assert side == (columns[1] - columns[0] - 1) // classes
    inner = seen[rows[0] + 1 : rows[1], columns[0] + 1 : columns[1]]
    return inner[1::side, 1::side][:classes, :classes]


def names(classes: int) -> list[str]:
    return [f"class {number}" for number in range(classes)]


def assert_clear_margin(picture: Image.Image) -> None:
    seen = pixels(picture)
    edge = np.concatenate((seen[0], seen[-1], seen[:, 0], seen[:, -1]))
    assert (edge == WHITE).all(), "something is cut off"


@pytest.mark.parametrize("classes", [2, 3, 10, 20, 21, 100, 300])
def test_right_is_blue_wrong_is_red_and_none_is_white(classes: int) -> None:
    confusion = 40 * np.eye(classes, dtype=np.int64)
    confusion[0, 1] = 40  # row 0: a true image of class 0 taken for class 1
    picture = confusion_picture(confusion, names(classes))
    seen = cells(picture, classes)
    red, blue = seen[0, 1, 0] - seen[0, 1, 2], seen[1, 1, 2] - seen[1, 1, 0]
    assert red > 40
    assert blue > 40
    assert (seen[1, 0] == WHITE).all()
    assert seen[1, 1].sum() < seen[0, 0].sum()  # all of a class, and half of one
    assert_clear_margin(picture)


def test_rare_mistakes_are_seen() -> None:
    seen = cells(confusion_picture(np.array([[99, 1], [0, 100]]), names(2)), 2)
    assert WHITE - seen[0, 1, 1] > 15


def test_counts_stand_in_the_cells_of_few_classes() -> None:
    one, other = (np.full((20, 20), count) for count in (1, 8))  # the same shares
    assert (pixels(confusion_picture(one, names(20))) != pixels(confusion_picture(other, names(20)))).any()
    one, other = (np.full((21, 21), count) for count in (1, 8))
    assert (pixels(confusion_picture(one, names(21))) == pixels(confusion_picture(other, names(21)))).all()


def test_counts_of_any_length_have_room() -> None:
    small, large = (confusion_picture(np.full((2, 2), count), names(2)) for count in (7, 1_234_567))
    assert large.width > small.width - 1
    assert large.height > small.height + 30


def test_a_class_without_images() -> None:
    assert (cells(confusion_picture(np.zeros((3, 3), np.int64), names(3)), 3) == WHITE).all()


@pytest.mark.parametrize("name", ["", "two\nlines\tof it", "日本語", "a\udcffb", "x" * 500])
def test_any_folder_name_can_be_written(name: str) -> None:
    images = LabeledImages(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64))
    assert_clear_margin(confusion_picture(np.eye(2, dtype=np.int64), [name, "b"]))
    picture = mistakes_picture([Mistake(0, 1, 0.5)], images, [name, "b"])
    assert_clear_margin(picture)
    assert picture.width < 300


def noise(count: int, height: int = 32, width: int = 32) -> LabeledImages:
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return LabeledImages(images, np.arange(count) % 3)


def test_a_mistake_is_shown_pixel_by_pixel() -> None:
    images = noise(3)
    seen = pixels(mistakes_picture([Mistake(2, 0, 0.9)], images, names(3)))
    tile = np.repeat(np.repeat(images.images[2], 4, 0), 4, 1)
    assert (seen[12 : 12 + 128, 12 : 12 + 128] == tile).all()
    assert (seen[12 + 130 :] != WHITE).any()  # its text


def test_mistakes_stand_in_their_order_in_rows_of_five() -> None:
    images = noise(25)
    picture = mistakes_picture([Mistake(24 - place, 0, 0.9) for place in range(25)], images, names(3))
    seen = pixels(picture)
    across, down = (picture.width - 12) // 5, (picture.height - 12) // 5
    corners = seen[12::down, 12::across][:5, :5]
    assert (corners.reshape(25, 3) == images.images[::-1, 0, 0]).all()
    assert_clear_margin(picture)


@pytest.mark.parametrize("change", [{"predicted": 1}, {"score": 0.8}, {"position": 1}])
def test_true_class_predicted_class_and_score_are_written(change: dict[str, Any]) -> None:
    images = LabeledImages(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2))  # alike but for their class
    mistake = Mistake(0, 2, 0.9)
    plain, changed = (
        pixels(mistakes_picture([one], images, names(3))) for one in (mistake, mistake._replace(**change))
    )
    assert plain.shape == changed.shape
    assert (plain != changed).any()


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 200), (129, 500), (200, 8), (1, 32)])
def test_images_of_any_size(height: int, width: int) -> None:
    picture = mistakes_picture([Mistake(0, 1, 0.5), Mistake(1, 2, 0.5)], noise(2, height, width), names(3))
    assert picture.width < 350
    assert picture.height < 250
    assert_clear_margin(picture)


def test_no_mistakes_is_said() -> None:
    assert (pixels(mistakes_picture([], noise(1), names(3))) != WHITE).any()


def test_long_names_lose_their_middle() -> None:
    short = fitted("Golden-mantled ground squirrel of the west", 13, 120)
    assert text_width(short, 13) <= 120
    assert short.startswith("Golden")
    assert short.endswith("west")
    assert fitted("cat", 13, 120) == "cat"
