"""Draws the misclassified images with the highest confidence as one image."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cifarx_train.callbacks.tensorboard.text import BACKGROUND, TEXT_COLOR, font, line_height, shorten, text_width
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Mistake

_COLUMNS: Final = 5
_TILE_SIZE: Final = 128  # the approximate size in pixels to which an image is scaled
_MAX_TEXT_WIDTH: Final = 200
_FONT_SIZE: Final = 13
_GAP: Final = 12
_WRONG_COLOR: Final = (165, 15, 21)


def mistakes_image(mistakes: Sequence[Mistake], images: LabeledImages, class_names: Sequence[str]) -> Image.Image:
    """Draw a grid of misclassified images, each with its true class, its predicted class and the confidence."""
    if not mistakes:
        return _no_mistakes_image()
    tiles = [_tile(images.images[mistake.image_index]) for mistake in mistakes]
    captions = [_caption(mistake, int(images.labels[mistake.image_index]), class_names) for mistake in mistakes]
    caption_width = max(text_width(line, _FONT_SIZE) for caption in captions for line in caption)
    width = max(*(tile.width for tile in tiles), caption_width) + _GAP
    image_height = max(tile.height for tile in tiles)
    height = image_height + 3 * line_height(_FONT_SIZE) + _GAP
    columns, rows = min(_COLUMNS, len(tiles)), -(-len(tiles) // _COLUMNS)
    grid = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for number, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = _GAP + number % _COLUMNS * width, _GAP + number // _COLUMNS * height
        grid.paste(tile, (left, top))
        for line, (text, color) in enumerate(zip(caption, (TEXT_COLOR, _WRONG_COLOR, _WRONG_COLOR), strict=True)):
            y = top + image_height + 2 + line * line_height(_FONT_SIZE)
            draw.text((left, y), text, color, font(_FONT_SIZE))
    return grid


def _tile(image: NDArray[np.uint8]) -> Image.Image:
    """Enlarge an image by a whole factor without interpolation, or shrink one that is larger than a tile."""
    tile = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image)).convert("RGB")
    if max(tile.size) > _TILE_SIZE:
        tile.thumbnail((_TILE_SIZE, _TILE_SIZE))
        return tile
    factor = _TILE_SIZE // max(tile.size)
    return tile.resize((factor * tile.width, factor * tile.height), Image.Resampling.NEAREST)


def _caption(mistake: Mistake, label: int, class_names: Sequence[str]) -> tuple[str, str, str]:
    return (
        shorten(f"true: {class_names[label]}", _FONT_SIZE, _MAX_TEXT_WIDTH),
        shorten(f"predicted: {class_names[mistake.predicted]}", _FONT_SIZE, _MAX_TEXT_WIDTH),
        f"confidence: {mistake.confidence:.1%}",
    )


def _no_mistakes_image() -> Image.Image:
    text = "no mistakes"
    image = Image.new("RGB", (text_width(text, _FONT_SIZE) + 2 * _GAP, line_height(_FONT_SIZE) + 2 * _GAP), BACKGROUND)
    ImageDraw.Draw(image).text((_GAP, _GAP), text, TEXT_COLOR, font(_FONT_SIZE))
    return image
