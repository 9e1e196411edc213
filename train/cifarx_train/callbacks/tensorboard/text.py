"""Text in the images of a run."""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

TEXT_COLOR = (32, 32, 32)
BACKGROUND = (255, 255, 255)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's built-in font at a size in pixels, so that images look the same on every machine."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Return the width of one line in pixels."""
    return round(font(size).getlength(text) + 0.5)


def shorten(text: str, size: int, width: int) -> str:
    """Return the text as one line of at most `width` pixels, with the middle of longer texts replaced by "...".

    The middle is removed because names differ at the end as often as at the beginning.
    """
    line = " ".join(text.split())
    kept = len(line)
    short = line
    while kept and text_width(short, size) > width:
        kept -= 1
        short = f"{line[: kept - kept // 2]}...{line[len(line) - kept // 2 :]}"
    return short


def vertical_text(text: str, size: int) -> Image.Image:
    """Return an image of one line of text that reads from bottom to top."""
    image = Image.new("RGB", (text_width(text, size) + 1, line_height(size)), BACKGROUND)
    ImageDraw.Draw(image).text((0, image.height // 2), text, TEXT_COLOR, font(size), anchor="lm")
    return image.transpose(Image.Transpose.ROTATE_90)


def line_height(size: int) -> int:
    """Return the distance between two lines in pixels."""
    return size + size // 3
