"""Resizes pixels without antialiasing, as PyTorch's `interpolate` does. Pillow always antialiases.

Source: `aten/src/ATen/native/UpSample.h` and `cpu/UpSampleKernel.cpp` of PyTorch, with `align_corners=False`.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import Interpolation

_CUBIC: Final = np.float32(-0.75)
"""The parameter of PyTorch's bicubic filter without antialiasing, as in OpenCV. Pillow's is -0.5."""


def interpolate(
    pixels: NDArray[np.uint8], size: tuple[int, int], kept: tuple[slice, slice], interpolation: Interpolation
) -> NDArray[np.uint8]:
    """Resize pixels without antialiasing, and crop them.

    Args:
        pixels: uint8 of shape (H, W) or (H, W, channels).
        size: the new width and height.
        kept: the rows and columns of the resized pixels to return.
        interpolation: nearest, bilinear or bicubic.
    """
    width, height = size
    kept_rows, kept_columns = (np.arange(part.start, part.stop, dtype=np.float32) for part in kept)
    scale_y = np.float32(pixels.shape[0]) / np.float32(height)
    scale_x = np.float32(pixels.shape[1]) / np.float32(width)
    if interpolation == "nearest":
        nearest_rows = pixels[_nearest(kept_rows, scale_y, pixels.shape[0])]
        return nearest_rows[:, _nearest(kept_columns, scale_x, pixels.shape[1])]
    taps = _cubic_taps if interpolation == "bicubic" else _linear_taps
    columns = taps(_centers(kept_columns, scale_x), pixels.shape[1])
    first, last = columns[0][0][0], columns[-1][0][-1]
    pixels = pixels[:, first : last + 1]  # a crop of a panorama needs only a few of its columns
    extra = (1,) * (pixels.ndim - 2)  # the axis of the channels, if any
    result = np.zeros((len(kept_rows), len(kept_columns), *pixels.shape[2:]), np.float32)
    for row_indices, row_weights in taps(_centers(kept_rows, scale_y), pixels.shape[0]):
        rows = pixels.take(row_indices, axis=0)
        line = np.zeros_like(result)
        for indices, weights in columns:
            line += rows.take(indices - first, axis=1) * weights.reshape(1, -1, *extra)
        line *= row_weights.reshape(-1, 1, *extra)
        result += line
    return result.round().clip(0, 255).astype(np.uint8)


def _nearest(kept: NDArray[np.float32], scale: np.float32, size: int) -> NDArray[np.intp]:
    """Return the index of the source of each kept pixel along an axis of `size` pixels."""
    return np.minimum((kept * scale).astype(np.intp), size - 1)


def _centers(kept: NDArray[np.float32], scale: np.float32) -> NDArray[np.float32]:
    """Return where the center of each kept pixel is in the source, with the center of its first pixel at 0."""
    return scale * (kept + np.float32(0.5)) - np.float32(0.5)


def _linear_taps(positions: NDArray[np.float32], size: int) -> list[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """Return the index and weight of each of the two sources of each position along an axis of `size` pixels."""
    positions = np.maximum(positions, np.float32(0))
    lower = np.minimum(positions.astype(np.intp), size - 1)
    upper = np.minimum(lower + 1, size - 1)
    fraction = (positions - lower.astype(np.float32)).clip(0, 1)
    return [(lower, 1 - fraction), (upper, fraction)]


def _cubic_taps(positions: NDArray[np.float32], size: int) -> list[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """Return the index and weight of each of the four sources of each position along an axis of `size` pixels."""
    lower = np.minimum(np.floor(positions).astype(np.intp), size - 1)
    fraction = (positions - lower.astype(np.float32)).clip(0, 1)
    distances = (fraction + 1, fraction, 1 - fraction, 2 - fraction)
    weights = (_far(distances[0]), _near(distances[1]), _near(distances[2]), _far(distances[3]))
    return [((lower + offset).clip(0, size - 1), weight) for offset, weight in zip(range(-1, 3), weights, strict=True)]


def _near(distance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the weight of a source at a distance of up to one pixel (Keys 1981)."""
    return ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1


def _far(distance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the weight of a source at a distance of one to two pixels."""
    return ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
