"""Draws contact sheets: images in a grid with their predicted labels and scores."""

import io
import math
import os
import unicodedata
from bisect import bisect_right
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.files.atomic import atomic_path, require_writable, write_error
from cifarx_serve.images.paths import STANDARD_INPUT
from cifarx_serve.images.reader import ImageSource, read_image
from cifarx_serve.predictor import Prediction

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
"""The file formats of a contact sheet."""

MAX_IMAGES: Final = 64
"""The number of images that are drawn; of any others the sheet shows only the count."""

MAX_COLUMNS: Final = 8
"""The maximum number of images per row."""

THUMBNAIL_SIZE: Final = 160
"""The side of the square that an image is fitted into, in pixels."""

# In pixels.
_MARGIN: Final = 24
_GAP: Final = 20
_LINE: Final = 18
_HEADING: Final = 46  # the height of the title, including the space around the lines below it
_CAPTION: Final = 56  # the height of the text below an image
_BAR: Final = 4

_BACKGROUND: Final = "#ffffff"
_TEXT: Final = "#1f2328"
_GRAY: Final = "#6e7781"
_LIGHT: Final = "#eceff2"  # behind images, and the empty part of a score bar
_CROSS: Final = "#c3cad1"
_BLUE: Final = "#2563eb"
_RED: Final = "#b42318"

_TITLE: Final = 22
_LABEL: Final = 15
_SMALL: Final = 13

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _Cell(NamedTuple):
    """One image; `thumbnail` is None if it could not be read."""

    name: str
    thumbnail: Image.Image | None
    prediction: Prediction | ImageError


class ContactSheet:
    """A contact sheet of the first `MAX_IMAGES` images, which are added one at a time and kept as thumbnails.

    Args:
        target: the file to write.

    Raises:
        UsageError: the name of the file ends in none of `SUFFIXES`.
        OutputError: the file cannot be written.
    """

    def __init__(self, target: Path) -> None:
        if target.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"cannot write a contact sheet as {target}", f"give a name that ends in {', '.join(SUFFIXES)}"
            )
        require_writable(target.parent)
        if target.is_dir():
            raise write_error(target, IsADirectoryError(None, "Is a directory"))
        self._target = target
        self._cells: list[_Cell] = []
        self._count = 0

    def add(self, name: str, source: ImageSource, prediction: Prediction | ImageError) -> None:
        """Add the next image.

        Args:
            name: the path of the image, of which the file name is shown, or `-` for standard input.
            source: where to read the image from. It is not read after an error. An unreadable image gets a cross.
            prediction: the prediction, or the error if the image could not be read.
        """
        self._count += 1
        if len(self._cells) == MAX_IMAGES:
            return
        thumbnail = None
        if not isinstance(prediction, ImageError):
            with suppress(ImageError):
                thumbnail = make_thumbnail(source)
        self._cells.append(_Cell(name, thumbnail, prediction))

    def write(self, title: str, facts: str) -> None:
        """Draw the sheet and write it atomically; see `draw` for the arguments.

        Raises:
            OutputError: the file cannot be written.
        """
        sheet = self.draw(title, facts)
        with atomic_path(self._target) as temporary:
            sheet.save(temporary, quality=95, subsampling=0)  # keeps colored text sharp in JPEG; PNG ignores both

    def draw(self, title: str, facts: str) -> Image.Image:
        """Return the sheet as an RGB image.

        Args:
            title: the name of the model.
            facts: a sentence about the model, which is wrapped.
        """
        columns = min(MAX_COLUMNS, max(1, math.ceil(math.sqrt(len(self._cells)))))
        rows = math.ceil(len(self._cells) / columns)
        cell_width, cell_height = THUMBNAIL_SIZE + _GAP, THUMBNAIL_SIZE + _CAPTION + _GAP
        inner = max(columns, 2) * cell_width - _GAP  # a single column is too narrow for the lines above it
        lines = _wrapped(facts, _font(_SMALL), inner)
        top = _MARGIN + _HEADING + len(lines) * _LINE
        more = self._count - len(self._cells)
        height = top + rows * cell_height - _GAP + (_LINE + _GAP if more else 0) + _MARGIN
        page = _Page(inner + 2 * _MARGIN, height)
        page.text(_MARGIN, _MARGIN + 18, _fitted(title, _font(_TITLE), inner), _TITLE, _TEXT)
        for number, line in enumerate(lines):
            page.text(_MARGIN, _MARGIN + 40 + number * _LINE, line, _SMALL, _GRAY)
        for position, cell in enumerate(self._cells):
            row, column = divmod(position, columns)
            page.cell(_MARGIN + column * cell_width, top + row * cell_height, cell)
        if more:
            page.text(_MARGIN, height - _MARGIN, f"and {more:,} more", _LABEL, _GRAY)
        return page.image


class _Page:
    """A white image to draw on. Positions are in pixels; the position of text is the left end of its baseline."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), _BACKGROUND)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int, color: str, align: Literal["l", "r"] = "l") -> None:
        """Draw a line of text that `_fitted` or `_wrapped` returned; with `align` "r", `x` is its right end."""
        self._draw.text((x, y), text, color, _font(size), anchor=f"{align}s")

    def cell(self, x: int, y: int, cell: _Cell) -> None:
        """Draw an image with its prediction and file name; `x`, `y` is the upper left corner."""
        self._box(x, y, THUMBNAIL_SIZE, THUMBNAIL_SIZE, _LIGHT)
        if cell.thumbnail is None:
            self._cross(x, y)
        else:
            left, above = ((THUMBNAIL_SIZE - side) // 2 for side in cell.thumbnail.size)
            self.image.paste(cell.thumbnail, (x + left, y + above))
        if isinstance(cell.prediction, ImageError):
            for number, line in enumerate(_reason(cell.name, cell.prediction), 1):
                self.text(x, y + THUMBNAIL_SIZE + 4 + number * 15, line, _SMALL, _RED)
        else:
            self._prediction(x, y + THUMBNAIL_SIZE, cell.prediction)
        name = "standard input" if cell.name == STANDARD_INPUT else Path(cell.name).name
        shown = _fitted(name, _font(_SMALL), THUMBNAIL_SIZE, tail=0.5)  # file names mostly differ at the end
        self.text(x, y + THUMBNAIL_SIZE + _CAPTION - 4, shown, _SMALL, _GRAY)

    def _prediction(self, x: int, y: int, prediction: Prediction) -> None:
        """Draw the labels, the best score as a percentage, and that score as a bar, below `y`."""
        score = f"{prediction.score:.1%}"
        room = THUMBNAIL_SIZE - _font(_LABEL).getlength(score) - 8
        self.text(x, y + 22, _fitted(_label(prediction), _font(_LABEL), room), _LABEL, _TEXT)
        self.text(x + THUMBNAIL_SIZE, y + 22, score, _LABEL, _TEXT, align="r")
        self._box(x, y + 29, THUMBNAIL_SIZE, _BAR, _LIGHT)
        if prediction.score > 0:  # false for NaN
            self._box(x, y + 29, max(1, round(THUMBNAIL_SIZE * prediction.score)), _BAR, _BLUE)

    def _cross(self, x: int, y: int) -> None:
        near, far = THUMBNAIL_SIZE * 3 // 8, THUMBNAIL_SIZE * 5 // 8
        self._draw.line((x + near, y + near, x + far, y + far), _CROSS, 6)
        self._draw.line((x + near, y + far, x + far, y + near), _CROSS, 6)

    def _box(self, x: int, y: int, width: int, height: int, color: str) -> None:
        self._draw.rectangle((x, y, x + width - 1, y + height - 1), color)


def _label(prediction: Prediction) -> str:
    """Return the best label, or all labels that apply."""
    if prediction.labels is None:
        return prediction.label
    return ", ".join(candidate.label for candidate in prediction.labels) or "no label"


def make_thumbnail(source: ImageSource) -> Image.Image:
    """Return an RGB image fitted into a square of `THUMBNAIL_SIZE`.

    A small image is enlarged by an integer factor, so that its pixels stay sharp.

    Raises:
        ImageError: the image cannot be read.
    """
    image = _read(source)
    longer = max(image.size)
    if longer <= THUMBNAIL_SIZE:
        factor = THUMBNAIL_SIZE // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * THUMBNAIL_SIZE / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _read(source: ImageSource) -> Image.Image:
    """Read an image like `read_image`, but decode a large JPEG at reduced size, which takes a quarter of the time."""
    if isinstance(source, str | os.PathLike | bytes):
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        # Other formats and damaged files are left to `read_image` below.
        with suppress(Exception), Image.open(file, formats=("JPEG",)) as image:
            image.draft("RGB", (2 * THUMBNAIL_SIZE, 2 * THUMBNAIL_SIZE))
            return read_image(image)
    return read_image(source)


def _reason(name: str, error: ImageError) -> list[str]:
    """Return the problem in at most two lines, without the name of the file, which is shown anyway."""
    path = Path(name)
    problem = error.problem.removeprefix(f"{path} is ").replace(f"open image {path} ", "open image ", 1)
    first, *others = _wrapped(problem, _font(_SMALL), THUMBNAIL_SIZE)
    return [first, _fitted(" ".join(others), _font(_SMALL), THUMBNAIL_SIZE)] if others else [first]


@cache
def _font(size: int) -> Font:
    """Return the font that ships with Pillow, so that none has to be installed; the size is in pixels."""
    return ImageFont.load_default(size)


def _wrapped(text: str, font: Font, width: float) -> list[str]:
    """Wrap text into lines of at most `width` pixels, at least one; a wider word loses its middle."""
    lines: list[str] = []
    for word in _drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_fitted(word, font, width, tail=0.5))
    return lines or [""]


def _fitted(text: str, font: Font, width: float, tail: float = 0.0) -> str:
    """Shorten text with an ellipsis to `width` pixels; `tail` is the fraction of the remaining text kept at the end."""
    text = _drawable(text)
    if font.getlength(text) <= width:
        return text

    def cut(kept: int) -> str:
        last = int(kept * tail)
        return f"{text[: kept - last]}…{text[len(text) - last :]}"

    return cut(max(0, bisect_right(range(len(text)), width, key=lambda kept: font.getlength(cut(kept))) - 1))


def _drawable(text: str) -> str:
    """Return one line of text for a font that has little more than ASCII: é becomes e, other characters a box."""
    plain = (character for character in unicodedata.normalize("NFKD", text) if not unicodedata.combining(character))
    return "".join(" " if one.isspace() else one if one.isprintable() else "\ufffd" for one in plain)
