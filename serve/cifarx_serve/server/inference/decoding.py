"""Decodes uploaded image files to the pixels that a model takes: in the event loop, in threads or in processes."""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.images.image_format import FORMATS, HEAD_BYTES, extra_formats, require_accepted
from cifarx_serve.images.preprocess import model_pixels, resized_size
from cifarx_serve.images.reader import open_image, read_image
from cifarx_serve.server.inference.deadline import Deadline, ThreadPool
from cifarx_serve.server.inference.decoder_pool import DecoderPool
from cifarx_serve.spec import InputSpec, ModelSpec

_PREDICTABLE_FORMATS: Final = ("PNG", "JPEG")
"""The formats whose decoding takes a time that follows from the pixels and the bytes, after the checks of `reader`."""

_MAX_INLINE_PIXELS: Final = 128 * 128
_MAX_INLINE_BYTES: Final = 32 * 1024
"""An image of these formats up to both sizes is decoded in the event loop, in a fraction of a millisecond.

The bytes are limited too because they bound the number of scans and chunks, each of which takes time. A hundred JPEG
scans of this size take a millisecond, and the most text that `inner_sizes` allows takes 20 ms.
"""

_MAX_THREAD_PIXELS: Final = 1024 * 1024
_MAX_THREAD_BYTES: Final = 4 * 1024 * 1024
"""An image of these formats up to both sizes is decoded in a thread, in a few hundredths of a second at most.

A thread cannot be ended at the deadline, but costs a tenth of a millisecond less than a process.
"""

_MAX_GROWTH: Final = 4
"""Before it is cropped, such an image may have this many times the pixels of the model's input."""


class ImageDecoder:
    """Decodes the images of requests. Use it in one event loop.

    Args:
        parallel: the number of threads, and of processes.
        max_pixels: the maximum number of pixels of any image.

    Raises:
        UsageError: as for `image_format.extra_formats`.
    """

    def __init__(self, parallel: int, max_pixels: int) -> None:
        extra_formats()  # report an invalid value now, not in the response to an image
        self._threads = ThreadPool(parallel, "decode")
        self._processes = DecoderPool(parallel, max_pixels)

    @property
    def is_stuck(self) -> bool:
        """Whether images wait for a process, but none has begun or finished for a while."""
        return self._processes.is_stuck

    async def decode(
        self, data: bytes, spec: ModelSpec, max_pixels: int, deadline: Deadline, is_disconnected: Callable[[], bool]
    ) -> NDArray[np.uint8]:
        """Decode an image file.

        Returns:
            Pixels, uint8 (H, W, channels), resized to the model's input unless the model does its own preprocessing.

        Raises:
            ImageError: the data is not a readable image, or its format is not accepted.
            TooManyPixels: the image has more than `max_pixels` pixels, or the model would resize it to more.
            SlowImage, DecoderUnavailable, DeadlineExceeded, RequestCancelled: as for `DecoderPool.decode`.
        """
        image_format = require_accepted(data[:HEAD_BYTES], f"{len(data)} bytes", FORMATS)
        if image_format in _PREDICTABLE_FORMATS and len(data) <= _MAX_THREAD_BYTES:
            image = open_image(data, max_pixels) if len(data) <= _MAX_INLINE_BYTES else None
            if image is not None and _is_small(image, _MAX_INLINE_PIXELS, spec.input):
                return model_pixels(read_image(image), spec, max_pixels)
            pixels = await self._threads.run(deadline, _decode_moderate, image or data, spec, max_pixels)
            if pixels is not None:
                return pixels
        return await self._processes.decode(data, spec, max_pixels, deadline, is_disconnected)

    def close(self) -> None:
        """End all threads and processes."""
        self._threads.close()
        self._processes.close()


def _decode_moderate(source: bytes | Image.Image, spec: ModelSpec, max_pixels: int) -> NDArray[np.uint8] | None:
    """Decode a file or an image that was opened, or return None if it has too many pixels for a thread."""
    image = open_image(source, max_pixels) if isinstance(source, bytes) else source
    if not _is_small(image, _MAX_THREAD_PIXELS, spec.input):
        return None
    return model_pixels(read_image(image), spec, max_pixels)


def _is_small(image: Image.Image, max_pixels: int, spec: InputSpec) -> bool:
    """Return whether an image has few pixels, and is not a panorama, which becomes large before it is cropped."""
    resized_pixels = math.prod(resized_size(image.width, image.height, spec))
    return image.width * image.height <= max_pixels and resized_pixels <= _MAX_GROWTH * spec.height * spec.width
