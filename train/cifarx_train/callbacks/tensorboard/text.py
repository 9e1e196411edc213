"""Names and numbers in the pictures of a run."""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

INK = (32, 32, 32)
PAPER = (255, 255, 255)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font at that size in pixels, so that a picture looks the same on every machine."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Pixels that one line takes."""
    return round(font(size).getlength(text) + 0.5)


def fitted(text: str, size: int, width: int) -> str:
    """The text as one line of at most `width` pixels: where it is longer its middle is left out, for names differ in
    their ends as often as in their beginnings.
    """
    line = " ".join(text.split())
    kept = len(line)
    short = line
    while kept and text_width(short, size) > width:
        kept -= 1
        short = f"{line[: kept - kept // 2]}...{line[len(line) - kept // 2 :]}"
    return short


def upright(text: str, size: int) -> Image.Image:
    """One line that reads from the bottom up, on paper."""
    picture = Image.new("RGB", (text_width(text, size) + 1, line_height(size)), PAPER)
    ImageDraw.Draw(picture).text((0, picture.height // 2), text, INK, font(size), anchor="lm")
    return picture.transpose(Image.Transpose.ROTATE_90)


def line_height(size: int) -> int:
    """Pixels from one line to the next."""
    return size + size // 3
