"""Decode uploaded image files to the pixels that a model takes."""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.images.image_format import FORMATS, HEAD_BYTES, require_accepted
from cifarx_serve.images.preprocess import model_pixels, resized_size
from cifarx_serve.images.reader import open_image, read_image
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoder_pool import DecoderPool
from cifarx_serve.spec import InputSpec, ModelSpec

_INLINE_FORMATS: Final = ("PNG", "JPEG")
_MAX_INLINE_PIXELS: Final = 128 * 128
_MAX_INLINE_BYTES: Final = 32 * 1024
"""A PNG or JPEG image up to both sizes is decoded in the event loop, in a fraction of a millisecond.

The bytes are limited too because they bound the number of scans and chunks, each of which takes time. A hundred JPEG
scans of this size take a millisecond, and the most text that `inner_sizes` allows takes 20 ms.
"""


_MAX_INLINE_GROWTH: Final = 4
"""Before it is cropped, such an image may have this many times the pixels of the model's input."""


async def decode_image(
    data: bytes,
    spec: ModelSpec,
    max_pixels: int,
    decoders: DecoderPool,
    deadline: Deadline,
    is_disconnected: Callable[[], bool],
) -> NDArray[np.uint8]:
    """Decode an image file; a large one in the pool of processes.

    Returns:
        Pixels, uint8 (H, W, channels), resized to the model's input unless the model does its own preprocessing.

    Raises:
        ImageError: the data is not a readable image, or its format is not accepted.
        TooManyPixels: the image has more than `max_pixels` pixels, or the model would resize it to more.
        SlowImage, DecoderUnavailable, DeadlineExceeded, RequestCancelled: as for `DecoderPool.decode`.
    """
    image_format = require_accepted(data[:HEAD_BYTES], f"{len(data)} bytes", FORMATS)
    if len(data) <= _MAX_INLINE_BYTES and image_format in _INLINE_FORMATS:
        image = open_image(data, max_pixels)
        if image.width * image.height <= _MAX_INLINE_PIXELS and not _is_panorama(image.width, image.height, spec.input):
            return model_pixels(read_image(image), spec, max_pixels)
    return await decoders.decode(data, spec, max_pixels, deadline, is_disconnected)


def _is_panorama(width: int, height: int, spec: InputSpec) -> bool:
    """Return whether an image becomes large before it is cropped, because one side is much longer than the other."""
    return math.prod(resized_size(width, height, spec)) > _MAX_INLINE_GROWTH * spec.height * spec.width
