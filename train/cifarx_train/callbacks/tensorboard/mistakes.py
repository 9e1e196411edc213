"""The mistakes that a model is surest of, as one picture."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cifarx_train.callbacks.tensorboard.text import INK, PAPER, fitted, font, line_height, text_width
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Mistake

_COLUMNS: Final = 5
_SIDE: Final = 128  # pixels that an image is enlarged or reduced to, about
_WIDEST: Final = 200  # pixels of a line of text
_SIZE: Final = 13
_GAP: Final = 12
_WRONG: Final = (165, 15, 21)


def mistakes_picture(mistakes: Sequence[Mistake], images: LabeledImages, class_names: Sequence[str]) -> Image.Image:
    """A grid of images, each above its true class, the class that it was taken for, and how sure the model was."""
    if not mistakes:
        return _no_mistakes()
    tiles = [_enlarged(images.images[mistake.position]) for mistake in mistakes]
    texts = [_lines(mistake, int(images.labels[mistake.position]), class_names) for mistake in mistakes]
    width = max(*(tile.width for tile in tiles), *(text_width(line, _SIZE) for lines in texts for line in lines)) + _GAP
    image_height = max(tile.height for tile in tiles)
    height = image_height + 3 * line_height(_SIZE) + _GAP
    columns, rows = min(_COLUMNS, len(tiles)), -(-len(tiles) // _COLUMNS)
    picture = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), PAPER)
    pen = ImageDraw.Draw(picture)
    for number, (tile, lines) in enumerate(zip(tiles, texts, strict=True)):
        left, top = _GAP + number % _COLUMNS * width, _GAP + number // _COLUMNS * height
        picture.paste(tile, (left, top))
        for line, (text, colour) in enumerate(zip(lines, (INK, _WRONG, _WRONG), strict=True)):
            pen.text((left, top + image_height + 2 + line * line_height(_SIZE)), text, colour, font(_SIZE))
    return picture


def _enlarged(image: NDArray[np.uint8]) -> Image.Image:
    """Every pixel as a square, so that one sees what the model saw; larger images are made smaller."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if max(picture.size) > _SIDE:
        picture.thumbnail((_SIDE, _SIDE))
        return picture
    factor = _SIDE // max(picture.size)
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def _lines(mistake: Mistake, label: int, class_names: Sequence[str]) -> tuple[str, str, str]:
    return (
        fitted(f"is {class_names[label]}", _SIZE, _WIDEST),
        fitted(f"taken for {class_names[mistake.predicted]}", _SIZE, _WIDEST),
        f"with {mistake.score:.1%}",
    )


def _no_mistakes() -> Image.Image:
    text = "no mistakes"
    picture = Image.new("RGB", (text_width(text, _SIZE) + 2 * _GAP, line_height(_SIZE) + 2 * _GAP), PAPER)
    ImageDraw.Draw(picture).text((_GAP, _GAP), text, INK, font(_SIZE))
    return picture
