"""A confusion matrix as a picture."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cifarx_train.callbacks.tensorboard.text import INK, PAPER, fitted, font, line_height, text_width, upright

MOST_CLASSES: Final = 1000
"""More give a picture that nobody can look at."""

_NUMBERED: Final = 20  # classes up to which every cell says its count
_SIZE: Final = 13
_DENSE: Final = 10  # the size of names where there are many
_WIDEST: Final = 150  # pixels of a name
_MARGIN: Final = 8
_RIGHT: Final = np.array((8, 81, 156))
_WRONG: Final = np.array((165, 15, 21))
_PREDICTED: Final = "predicted class"
_TRUE: Final = "true class"
_LEGEND: Final = ("shade: share of the true class's images", "blue: right, red: wrong")


def confusion_picture(confusion: NDArray[np.int64], class_names: Sequence[str]) -> Image.Image:
    """Rows are true classes and columns predicted ones; up to 20 classes have their counts in the cells."""
    classes = len(class_names)
    few = classes <= _NUMBERED
    size = _SIZE if few else _DENSE
    cell = (
        max(36, text_width(str(confusion.max()), _SIZE) + 8)
        if few
        else max(2, min(line_height(_DENSE), 2000 // classes))
    )
    every = -(-line_height(size) // cell)  # names that would cover each other are left out
    names = {index: fitted(class_names[index], size, _WIDEST) for index in range(0, classes, every)}
    longest = max(text_width(name, size) for name in names.values())
    edge = line_height(_SIZE) + 2 * _MARGIN + longest  # left of the cells and above them
    legend = max(text_width(line, _SIZE) for line in _LEGEND)
    side = max(classes * cell, text_width(_PREDICTED, _SIZE))  # so much room the axes' own names need
    width = max(edge + side, legend + _MARGIN) + _MARGIN
    height = edge + side + len(_LEGEND) * line_height(_SIZE) + 2 * _MARGIN
    picture = Image.new("RGB", (width, height), PAPER)
    shades = _shades(confusion)
    cells = Image.fromarray(_colours(shades)).resize((classes * cell, classes * cell), Image.Resampling.NEAREST)
    picture.paste(cells, (edge, edge))
    _write_names(picture, names, edge, cell, size)
    if few:
        _write_counts(picture, confusion, shades, edge, cell)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((edge - 1, edge - 1, edge + classes * cell, edge + classes * cell), outline=INK)
    for line, text in enumerate(_LEGEND):
        pen.text((_MARGIN, edge + side + _MARGIN + line * line_height(_SIZE)), text, INK, font(_SIZE))
    return picture


def _shades(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """From 0 to 1 a cell. The root of the share, for a class that is mistaken once in a hundred should be seen."""
    share: NDArray[np.float64] = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    return np.sqrt(share)


def _colours(shades: NDArray[np.float64]) -> NDArray[np.uint8]:
    full = np.where(np.eye(len(shades), dtype=bool)[..., None], _RIGHT, _WRONG)
    return (255 + (full - 255) * shades[..., None]).astype(np.uint8)


def _write_names(picture: Image.Image, names: Mapping[int, str], edge: int, cell: int, size: int) -> None:
    pen = ImageDraw.Draw(picture)
    for index, name in names.items():
        middle = edge + index * cell + cell // 2
        pen.text((edge - 4, middle), name, INK, font(size), anchor="rm")
        turned = upright(name, size)
        picture.paste(turned, (middle - turned.width // 2, edge - 4 - turned.height))
    pen.text((edge, _MARGIN), _PREDICTED, INK, font(_SIZE))
    picture.paste(upright(_TRUE, _SIZE), (_MARGIN, edge))


def _write_counts(
    picture: Image.Image, confusion: NDArray[np.int64], shades: NDArray[np.float64], edge: int, cell: int
) -> None:
    pen = ImageDraw.Draw(picture)
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            place = (edge + column * cell + cell // 2, edge + row * cell + cell // 2)
            pen.text(place, str(count), PAPER if shades[row, column] > 0.6 else INK, font(_SIZE), anchor="mm")
