"""Draws a confusion matrix as an image."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cifarx_train.callbacks.tensorboard.text import (
    BACKGROUND,
    TEXT_COLOR,
    font,
    line_height,
    shorten,
    text_width,
    vertical_text,
)

MAX_CLASSES: Final = 1000
"""With more classes, the image would be too large to view."""

_MAX_CLASSES_WITH_COUNTS: Final = 20
_FONT_SIZE: Final = 13
_SMALL_FONT_SIZE: Final = 10  # of class names when there are many
_MAX_NAME_WIDTH: Final = 150
_MARGIN: Final = 8
_CORRECT_COLOR: Final = np.array((8, 81, 156))
_WRONG_COLOR: Final = np.array((165, 15, 21))
_X_LABEL: Final = "predicted class"
_Y_LABEL: Final = "true class"
_LEGEND: Final = ("shade: fraction of the true class", "blue: correct, red: wrong")


def confusion_matrix_image(matrix: NDArray[np.int64], class_names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix. With up to 20 classes, every cell shows its count.

    Args:
        matrix: int64 (classes, classes), the number of images by true class (row) and predicted class (column).
        class_names: the classes in label order.
    """
    classes = len(class_names)
    with_counts = classes <= _MAX_CLASSES_WITH_COUNTS
    size = _FONT_SIZE if with_counts else _SMALL_FONT_SIZE
    cell = (
        max(36, text_width(str(matrix.max()), _FONT_SIZE) + 8)
        if with_counts
        else max(2, min(line_height(_SMALL_FONT_SIZE), 2000 // classes))
    )
    every = -(-line_height(size) // cell)  # skips names that would overlap
    names = {index: shorten(class_names[index], size, _MAX_NAME_WIDTH) for index in range(0, classes, every)}
    longest = max(text_width(name, size) for name in names.values())
    edge = line_height(_FONT_SIZE) + 2 * _MARGIN + longest  # space to the left of the cells and above them
    legend = max(text_width(line, _FONT_SIZE) for line in _LEGEND)
    side = max(classes * cell, text_width(_X_LABEL, _FONT_SIZE))  # leaves room for the labels of the axes
    width = max(edge + side, legend + _MARGIN) + _MARGIN
    height = edge + side + len(_LEGEND) * line_height(_FONT_SIZE) + 2 * _MARGIN
    image = Image.new("RGB", (width, height), BACKGROUND)
    shades = _shades(matrix)
    cells = Image.fromarray(_colors(shades)).resize((classes * cell, classes * cell), Image.Resampling.NEAREST)
    image.paste(cells, (edge, edge))
    _draw_names(image, names, edge, cell, size)
    if with_counts:
        _draw_counts(image, matrix, shades, edge, cell)
    draw = ImageDraw.Draw(image)
    draw.rectangle((edge - 1, edge - 1, edge + classes * cell, edge + classes * cell), outline=TEXT_COLOR)
    for line, text in enumerate(_LEGEND):
        top = edge + side + _MARGIN + line * line_height(_FONT_SIZE)
        draw.text((_MARGIN, top), text, TEXT_COLOR, font(_FONT_SIZE))
    return image


def _shades(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a shade from 0 to 1 per cell: the square root of the fraction, which keeps rare mistakes visible."""
    fraction: NDArray[np.float64] = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return np.sqrt(fraction)


def _colors(shades: NDArray[np.float64]) -> NDArray[np.uint8]:
    full = np.where(np.eye(len(shades), dtype=bool)[..., None], _CORRECT_COLOR, _WRONG_COLOR)
    return (255 + (full - 255) * shades[..., None]).astype(np.uint8)


def _draw_names(image: Image.Image, names: Mapping[int, str], edge: int, cell: int, size: int) -> None:
    draw = ImageDraw.Draw(image)
    for index, name in names.items():
        middle = edge + index * cell + cell // 2
        draw.text((edge - 4, middle), name, TEXT_COLOR, font(size), anchor="rm")
        rotated = vertical_text(name, size)
        image.paste(rotated, (middle - rotated.width // 2, edge - 4 - rotated.height))
    draw.text((edge, _MARGIN), _X_LABEL, TEXT_COLOR, font(_FONT_SIZE))
    image.paste(vertical_text(_Y_LABEL, _FONT_SIZE), (_MARGIN, edge))


def _draw_counts(
    image: Image.Image, matrix: NDArray[np.int64], shades: NDArray[np.float64], edge: int, cell: int
) -> None:
    draw = ImageDraw.Draw(image)
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            center = (edge + column * cell + cell // 2, edge + row * cell + cell // 2)
            color = BACKGROUND if shades[row, column] > 0.6 else TEXT_COLOR
            draw.text(center, str(count), color, font(_FONT_SIZE), anchor="mm")
