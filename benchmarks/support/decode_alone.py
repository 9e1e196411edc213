"""Decoding and nothing else, for processes of its own: they import this module by its name."""

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec


def decode(spec: InputSpec, paths: list[str]) -> NDArray[np.uint8]:
    """Image files at the network's size, (N, height, width, 3)."""
    return np.stack([resize(read_image(path), spec) for path in paths])


def decode_and_drop(spec: InputSpec, paths: list[str]) -> int:
    """How many; what is decoded stays in its process, for handing it over is no part of decoding."""
    return len(decode(spec, paths))
