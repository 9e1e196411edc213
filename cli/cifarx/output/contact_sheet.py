"""A contact sheet: images in a grid with their labels and scores, for people to look at."""

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
from cifarx_serve.files.atomic import atomic_path, cannot_write, require_writable
from cifarx_serve.images.paths import STANDARD_INPUT
from cifarx_serve.images.reader import ImageSource, read_image
from cifarx_serve.predictor import Prediction

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
"""What a sheet can be written as."""

LIMIT: Final = 64
"""Images that are drawn; of the others a sheet says how many they are."""

COLUMNS: Final = 8
"""The most images side by side."""

SIDE: Final = 160
"""Pixels of the square that a picture is fitted into."""

# Pixels.
_MARGIN: Final = 24
_GAP: Final = 20
_LINE: Final = 18
_HEADING: Final = 46  # the height of the title, and what is left free around the lines below it
_CAPTION: Final = 56  # the height of what stands below a picture
_BAR: Final = 4

_WHITE: Final = "#ffffff"
_DARK: Final = "#1f2328"
_GREY: Final = "#6e7781"
_FAINT: Final = "#eceff2"  # behind pictures, and what a score leaves of its bar
_CROSS: Final = "#c3cad1"
_BLUE: Final = "#2563eb"
_RED: Final = "#b42318"

_TITLE: Final = 22
_LABEL: Final = 15
_SMALL: Final = 13

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _Cell(NamedTuple):
    """One image: its picture no larger than `SIDE`, or None where there is none to draw."""

    name: str
    picture: Image.Image | None
    answer: Prediction | ImageError


class ContactSheet:
    """The first `LIMIT` of any number of images, given one at a time; only their thumbnails are kept.

    Args:
        target: the picture file to write.

    Raises:
        UsageError: its name ends in none of `SUFFIXES`.
        OutputError: it cannot be written there.
    """

    def __init__(self, target: Path) -> None:
        if target.suffix.lower() not in SUFFIXES:
            raise UsageError(f"a contact sheet as {target}", f"give a name that ends in {', '.join(SUFFIXES)}")
        require_writable(target.parent)
        if target.is_dir():
            raise cannot_write(target, IsADirectoryError(None, "Is a directory"))
        self._target = target
        self._cells: list[_Cell] = []
        self._count = 0

    def add(self, name: str, source: ImageSource, answer: Prediction | ImageError) -> None:
        """Take the next image.

        Args:
            name: its path, of which the last part is shown, or `-` for standard input.
            source: where it is read from, if there is a prediction; one that has gone since gets a cross.
            answer: what was found, or why it was not.
        """
        self._count += 1
        if len(self._cells) == LIMIT:
            return
        picture = None
        if not isinstance(answer, ImageError):
            with suppress(ImageError):
                picture = thumbnail(source)
        self._cells.append(_Cell(name, picture, answer))

    def write(self, title: str, facts: str) -> None:
        """Draw the sheet and write it, whole or not at all; the texts are those of `draw`.

        Raises:
            OutputError: it cannot be written.
        """
        sheet = self.draw(title, facts)
        with atomic_path(self._target) as temporary:
            sheet.save(temporary, quality=95, subsampling=0)  # text in colours stays sharp; PNG takes neither

    def draw(self, title: str, facts: str) -> Image.Image:
        """The sheet as RGB.

        Args:
            title: the model's name.
            facts: what the answers come from, in a sentence: it is wrapped.
        """
        columns = min(COLUMNS, max(1, math.ceil(math.sqrt(len(self._cells)))))
        rows = math.ceil(len(self._cells) / columns)
        across, down = SIDE + _GAP, SIDE + _CAPTION + _GAP
        inner = max(columns, 2) * across - _GAP  # a single picture is too narrow for what stands above it
        lines = _wrapped(facts, _font(_SMALL), inner)
        top = _MARGIN + _HEADING + len(lines) * _LINE
        more = self._count - len(self._cells)
        height = top + rows * down - _GAP + (_LINE + _GAP if more else 0) + _MARGIN
        page = _Page(inner + 2 * _MARGIN, height)
        page.text(_MARGIN, _MARGIN + 18, _fitted(title, _font(_TITLE), inner), _TITLE, _DARK)
        for number, line in enumerate(lines):
            page.text(_MARGIN, _MARGIN + 40 + number * _LINE, line, _SMALL, _GREY)
        for position, cell in enumerate(self._cells):
            row, column = divmod(position, columns)
            page.cell(_MARGIN + column * across, top + row * down, cell)
        if more:
            page.text(_MARGIN, height - _MARGIN, f"and {more:,} more", _LABEL, _GREY)
        return page.image


class _Page:
    """White paper, and what is drawn on it at a position in pixels; that of text is the left end of its baseline."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), _WHITE)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int, colour: str, align: Literal["l", "r"] = "l") -> None:
        """Text that fits and can be drawn; with `align` "r", `x` is its right end."""
        self._draw.text((x, y), text, colour, _font(size), anchor=f"{align}s")

    def cell(self, x: int, y: int, cell: _Cell) -> None:
        """An image at its upper left corner: the picture, what was found, the file's name."""
        self._box(x, y, SIDE, SIDE, _FAINT)
        if cell.picture is None:
            self._cross(x, y)
        else:
            left, above = ((SIDE - side) // 2 for side in cell.picture.size)
            self.image.paste(cell.picture, (x + left, y + above))
        if isinstance(cell.answer, ImageError):
            for number, line in enumerate(_reason(cell.name, cell.answer), 1):
                self.text(x, y + SIDE + 4 + number * 15, line, _SMALL, _RED)
        else:
            self._score(x, y + SIDE, cell.answer)
        name = "standard input" if cell.name == STANDARD_INPUT else Path(cell.name).name
        shown = _fitted(name, _font(_SMALL), SIDE, tail=0.5)  # whose end tells files apart
        self.text(x, y + SIDE + _CAPTION - 4, shown, _SMALL, _GREY)

    def _score(self, x: int, y: int, found: Prediction) -> None:
        """The label, the score in per cent and as a bar, below `y`."""
        score = f"{found.score:.1%}"
        room = SIDE - _font(_LABEL).getlength(score) - 8
        self.text(x, y + 22, _fitted(found.label, _font(_LABEL), room), _LABEL, _DARK)
        self.text(x + SIDE, y + 22, score, _LABEL, _DARK, align="r")
        self._box(x, y + 29, SIDE, _BAR, _FAINT)
        if found.score > 0:  # which a number that is none is not
            self._box(x, y + 29, max(1, round(SIDE * found.score)), _BAR, _BLUE)

    def _cross(self, x: int, y: int) -> None:
        near, far = SIDE * 3 // 8, SIDE * 5 // 8
        self._draw.line((x + near, y + near, x + far, y + far), _CROSS, 6)
        self._draw.line((x + near, y + far, x + far, y + near), _CROSS, 6)

    def _box(self, x: int, y: int, width: int, height: int, colour: str) -> None:
        self._draw.rectangle((x, y, x + width - 1, y + height - 1), colour)


def thumbnail(source: ImageSource) -> Image.Image:
    """A picture fitted into `SIDE` by `SIDE` pixels, RGB.

    A small one is enlarged by a whole factor, so that its pixels show as they are.

    Raises:
        ImageError: it cannot be read.
    """
    picture = _read(source)
    longer = max(picture.size)
    if longer <= SIDE:
        factor = SIDE // longer
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * SIDE / longer)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _read(source: ImageSource) -> Image.Image:
    """As `read_image`; but a large JPEG file is decoded at a fraction of its size: a quarter of the time."""
    if isinstance(source, str | os.PathLike | bytes):
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        # Whatever is wrong, or is no JPEG, is read below, or told there.
        with suppress(Exception), Image.open(file, formats=("JPEG",)) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            return read_image(image)
    return read_image(source)


def _reason(name: str, error: ImageError) -> list[str]:
    """Why there is no picture, in at most two lines: without the name, which is shown, and without the remedy."""
    path = Path(name)
    problem = error.problem.removeprefix(f"{path} is ").replace(f"open image {path} ", "open image ", 1)
    first, *others = _wrapped(problem, _font(_SMALL), SIDE)
    return [first, _fitted(" ".join(others), _font(_SMALL), SIDE)] if others else [first]


@cache
def _font(size: int) -> Font:
    """The font that Pillow brings, at a size in pixels: no system need have one."""
    return ImageFont.load_default(size)


def _wrapped(text: str, font: Font, width: float) -> list[str]:
    """Lines of at most `width` pixels, at least one; a word that is wider loses its middle."""
    lines: list[str] = []
    for word in _drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_fitted(word, font, width, tail=0.5))
    return lines or [""]


def _fitted(text: str, font: Font, width: float, tail: float = 0.0) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels; `tail` is the share kept of its end."""
    text = _drawable(text)
    if font.getlength(text) <= width:
        return text

    def cut(kept: int) -> str:
        last = int(kept * tail)
        return f"{text[: kept - last]}…{text[len(text) - last :]}"

    return cut(max(0, bisect_right(range(len(text)), width, key=lambda kept: font.getlength(cut(kept))) - 1))


def _drawable(text: str) -> str:
    """One line of text for a font of little more than ASCII: é as e, and what it lacks as its box."""
    plain = (character for character in unicodedata.normalize("NFKD", text) if not unicodedata.combining(character))
    return "".join(" " if one.isspace() else one if one.isprintable() else "\ufffd" for one in plain)
