"""Converts RGB images to the input of a network. Training, export and serving all use these functions."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.spec import InputSpec, ModelSpec

_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def resize(image: Image.Image, spec: InputSpec) -> NDArray[np.uint8]:
    """Resize an RGB image to the input size of the network.

    The aspect ratio is not kept, as with torchvision's `Resize((height, width))` on a Pillow image.

    Returns:
        uint8 of shape (height, width, 3).
    """
    size = (spec.width, spec.height)
    if image.size != size:
        image = image.resize(size, _FILTERS[spec.interpolation])
    return np.asarray(image)


def normalize(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """Scale pixels to the value range of the spec, normalize them, and move the channels first.

    With a range of 0 to 1, mean 0 and standard deviation 1, the result equals that of torchvision's `ToTensor` bit for
    bit.

    Args:
        pixels: uint8 of shape (N, H, W, 3).
        spec: the value range, mean and standard deviation.

    Returns:
        float32 of shape (N, 3, H, W).
    """
    batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    batch /= np.float32(255)
    low, high = spec.value_range
    if (low, high) != (0.0, 1.0):
        batch *= np.float32(high - low)
        batch += np.float32(low)
    if any(spec.mean) or any(std != 1.0 for std in spec.std):
        batch -= np.asarray(spec.mean, np.float32).reshape(1, 3, 1, 1)
        batch /= np.asarray(spec.std, np.float32).reshape(1, 3, 1, 1)
    return batch


def model_input(pixels: NDArray[np.uint8], spec: ModelSpec) -> NDArray[Any]:
    """Return the batch that a model's backend takes for RGB pixels.

    Args:
        pixels: uint8 of shape (N, H, W, 3), at the input size of the network.
        spec: the model's spec.

    Returns:
        The pixels themselves for a model with embedded preprocessing, or else float32 of shape (N, 3, H, W).
    """
    return pixels if spec.embedded_preprocessing else normalize(pixels, spec.input)
