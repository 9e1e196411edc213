"""Check that an `InputSpec` describes what a library's preprocessing does, by running both on two images."""

import warnings
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import SpecError
from cifarx_serve.images.preprocess import normalize, resize
from cifarx_serve.spec import InputSpec

MAX_LEVELS: Final = 8.0
MAX_MEAN_LEVELS: Final = 0.6
"""The largest difference that passes and the largest mean difference, in levels of 256.

Libraries that resize tensors round differently from Pillow. A wrong size, crop, filter, color, mean or standard
deviation changes the noise of the images by far more.
"""

_SIDES: Final = ((360, 540), (600, 400))  # width and height; halves of the differences to usual crops are integers


def require_same_preprocessing(
    spec: InputSpec, preprocess: Callable[[Image.Image], NDArray[np.float32]], origin: str
) -> InputSpec:
    """Return the spec if it describes the preprocessing.

    Args:
        spec: the spec.
        preprocess: the preprocessing of the library: maps an RGB image to float32 (channels, height, width).
        origin: what the preprocessing is, for messages.

    Raises:
        SpecError: the preprocessing does something else.
    """
    level = np.asarray(spec.value_range[1] - spec.value_range[0]) / 255 / np.asarray(spec.std)
    for size in _SIDES:
        image = _noise(size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning about what is ignored for Pillow images changes nothing
            expected = preprocess(image)
        found = normalize(resize(image, spec)[None], spec)[0]
        if expected.shape != found.shape:
            raise _error(origin, f"its result is {expected.shape}, not {found.shape}")
        levels = np.abs(expected - found) / level.reshape(-1, 1, 1)
        if levels.max() > MAX_LEVELS or levels.mean() > MAX_MEAN_LEVELS:
            raise _error(origin, f"its pixels differ by up to {levels.max():.1f} levels of 256")
    return spec


def _noise(size: tuple[int, int]) -> Image.Image:
    """Return an image that no two crops, filters or color orders map to the same pixels."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def _error(origin: str, difference: str) -> SpecError:
    return SpecError(
        f"{origin} does what a spec cannot describe ({difference})",
        "state the nearest preprocessing with --spec, or preprocess inside the network",
    )
