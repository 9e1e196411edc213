"""The mean and deviation of training images, a channel."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import InputSpec

_ROWS = 1024  # images counted at once: bounds the memory
_DIGITS = 4  # as such constants are published; a reader can check them


def normalized(spec: InputSpec, images: NDArray[np.uint8]) -> InputSpec:
    """The input spec that brings these images, uint8 (N, height, width, 3), to mean 0 and deviation 1 a channel.

    A channel without any deviation keeps its scale. Exact but for the rounding: computed from counts of grey levels.
    """
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), _ROWS):
        part = np.asarray(images[start : start + _ROWS]).reshape(-1, 3)
        for channel in range(3):
            counts[channel] += np.bincount(part[:, channel], minlength=256)
    low, high = spec.value_range
    levels = low + (high - low) * np.arange(256) / 255
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ levels
    deviation = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1)).round(_DIGITS)
    std = np.where(deviation > 0, deviation, 1.0)
    return msgspec.structs.replace(spec, mean=tuple(mean.round(_DIGITS).tolist()), std=tuple(std.tolist()))
