"""Decode uploaded image files to the pixels that a model takes."""

from concurrent.futures import Executor
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.images.preprocess import model_pixels
from cifarx_serve.images.reader import open_image, read_image
from cifarx_serve.server.inference.deadline import Deadline, run_in_threadpool
from cifarx_serve.spec import ModelSpec

_MAX_INLINE_PIXELS: Final = 128 * 128
_MAX_INLINE_BYTES: Final = 32 * 1024
"""An image up to both sizes is decoded in the event loop, in a fraction of a millisecond: faster than via a thread.

The bytes are limited too because a file with few pixels can hold a thousand JPEG scans, or a million PNG chunks, and
take seconds to decode.
"""


async def decode_image(
    data: bytes, spec: ModelSpec, max_pixels: int, executor: Executor, deadline: Deadline
) -> NDArray[np.uint8]:
    """Decode an image file; a large one in the thread pool.

    Returns:
        Pixels, uint8 (H, W, channels), resized to the model's input unless the model does its own preprocessing.

    Raises:
        ImageError: the data is not a readable image.
        TooManyPixels: the image has more than `max_pixels` pixels; it was not decoded.
        DeadlineExceeded: the deadline passed while the image was decoded in the thread pool.
    """
    if len(data) > _MAX_INLINE_BYTES:
        return await run_in_threadpool(executor, deadline, _open_and_decode, data, max_pixels, spec)
    image = open_image(data, max_pixels)
    if image.width * image.height <= _MAX_INLINE_PIXELS:
        return _decode(image, spec)
    return await run_in_threadpool(executor, deadline, _decode, image, spec)


def _open_and_decode(data: bytes, max_pixels: int, spec: ModelSpec) -> NDArray[np.uint8]:
    return _decode(open_image(data, max_pixels), spec)


def _decode(image: Image.Image, spec: ModelSpec) -> NDArray[np.uint8]:
    return model_pixels(read_image(image), spec)
