"""The per-channel mean and standard deviation of the training images."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import InputSpec

_CHUNK = 1024  # images per step, which limits the memory use
_DIGITS = 4  # as many as published constants have, so that they are easy to compare


def fit_normalization(spec: InputSpec, images: NDArray[np.uint8]) -> InputSpec:
    """Return `spec` with the mean and std that normalize these images to mean 0 and standard deviation 1 per channel.

    The statistics are computed exactly, from a histogram per channel, and then rounded to four digits. A channel
    without any deviation gets a std of 1.

    Args:
        spec: the input spec, whose value range the statistics refer to.
        images: uint8 (N, height, width, channels), RGB or grayscale.
    """
    channels = spec.channels
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), _CHUNK):
        pixels = np.asarray(images[start : start + _CHUNK]).reshape(-1, channels)
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[:, channel], minlength=256)
    if spec.color == "BGR":
        counts = counts[::-1]
    low, high = spec.value_range
    levels = low + (high - low) * np.arange(256) / 255
    frequencies = counts / counts.sum(1, keepdims=True)
    mean = frequencies @ levels
    deviation = np.sqrt((frequencies * (levels - mean[:, None]) ** 2).sum(1)).round(_DIGITS)
    std = np.where(deviation > 0, deviation, 1.0)
    return msgspec.structs.replace(spec, mean=tuple(mean.round(_DIGITS).tolist()), std=tuple(std.tolist()))
