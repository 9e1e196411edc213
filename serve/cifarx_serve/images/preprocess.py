"""From an RGB picture to the network's input: the one implementation, for training, proof and serving."""

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
    """An RGB picture at the network's size: uint8, (height, width, 3).

    Both sides are stretched to the size, as torchvision's `Resize((height, width))` does on a Pillow image.
    """
    size = (spec.width, spec.height)
    if image.size != size:
        image = image.resize(size, _FILTERS[spec.resize])
    return np.asarray(image)


def scale(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """Pixels as the network's input: uint8 (N, H, W, 3) to float32 (N, 3, H, W).

    For a range of 0 to 1 without normalisation the bits are those of torchvision's `ToTensor`.
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
    """What a model's backend takes for RGB pixels, uint8 (N, H, W, 3) at the network's size.

    The pixels themselves where the file does its preprocessing, else float32 (N, 3, H, W).
    """
    return pixels if spec.embedded_preprocessing else scale(pixels, spec.input)
