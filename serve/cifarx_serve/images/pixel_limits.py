"""Limits the number of pixels of images, and of the parts that an image file contains."""

from typing import Final

from cifarx_serve.errors import ImageError

SAVE_AGAIN: Final = "save the image again in another program"
"""The remedy in the errors for files with an unusual structure."""


class TooManyPixels(ImageError):
    """Raised for an image with more pixels than the limit."""


def require_pixels(width: int, height: int, name: str, max_pixels: int, part: str = "") -> None:
    """Check the number of pixels of an image, or of a part of it.

    Raises:
        TooManyPixels: there are more than `max_pixels`.
    """
    if width * height > max_pixels:
        problem = f"{name} {part or 'is'} {width}x{height} pixels, over the limit of {max_pixels:,} pixels"
        raise TooManyPixels(problem, "resize the image first")


def too_many_parts(name: str, parts: str, limit: int) -> ImageError:
    """Return the error for an image file with more parts of a kind, such as tags or scans, than the limit."""
    return ImageError(f"{name} has more than {limit:,} {parts}", SAVE_AGAIN)
