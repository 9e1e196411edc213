"""Scales grayscale pixels of more than 8 bits to the levels 0 to 255.

What Pillow does instead, which is to clip them, turns most such images white or black.
"""

from typing import Final

import numpy as np
from PIL import Image

from cifarx_serve.errors import ImageError

# Formats whose 16-bit grayscale images Pillow opens in the 32-bit mode I (PNG until Pillow 10.3).
_16_BIT_AS_MODE_I: Final = ("PPM", "PNG")

_BITS_PER_SAMPLE: Final = 258  # a tag of TIFF


def has_more_than_8_bits(image: Image.Image) -> bool:
    """Return whether the pixels of an image are integers of more than 8 bits, or floating-point numbers."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_8_bits(image: Image.Image, stored: Image.Image) -> Image.Image:
    """Scale the pixels of such an image, and return it in mode L.

    16-bit integers lose their 8 lower bits, and 12-bit integers of TIFF files their 4 lower bits. Nothing says what is
    white for floating-point numbers and other integers. Floating-point numbers of which none is below 0 or above 1 are
    multiplied by 255; other numbers are taken for levels if all of them are in 0 to 255.

    Args:
        image: the pixels.
        stored: the image as it was opened, which has a format and tags.

    Raises:
        ImageError: the numbers have another range, or some are not finite.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and stored.format in _16_BIT_AS_MODE_I):
        return Image.fromarray((values >> _extra_bits(stored)).astype(np.uint8))
    low, high = values.min(), values.max()
    if image.mode == "F" and low >= 0 and high <= 1:
        return Image.fromarray((values * np.float32(255)).round().astype(np.uint8))
    if low >= 0 and high <= 255:
        return Image.fromarray(values.astype(np.uint8))
    kind = "floating-point numbers" if image.mode == "F" else "integers"
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError(f"the image has {kind} that are not finite", "replace them, and save the image with 8 bits")
    remedy = "0 to 1 or to 255" if image.mode == "F" else "0 to 255, or save it as a 16-bit PNG"
    raise ImageError(
        f"the image has {kind} from {low:g} to {high:g}, of which none is known to be white", f"scale it to {remedy}"
    )


def _extra_bits(image: Image.Image) -> int:
    """Return the number of bits beyond 8, which is 8 for everything but a 12-bit TIFF file."""
    return 4 if getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (12,) else 8
