"""Decoding alone. Worker processes import this module by name."""

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec


def decode(spec: InputSpec, paths: list[str]) -> NDArray[np.uint8]:
    """Return the images at the size of the network's input, uint8 (N, height, width, 3)."""
    return np.stack([resize(read_image(path), spec) for path in paths])


def decode_and_drop(spec: InputSpec, paths: list[str]) -> int:
    """Decode and return the number of images. Sending the pixels to another process is not part of decoding."""
    return len(decode(spec, paths))
