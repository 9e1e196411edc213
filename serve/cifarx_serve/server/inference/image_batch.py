"""Decodes the image files of one request to the pixels that a model takes, within the limits of the request."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import ImageError
from cifarx_serve.images.preprocess import peak_pixels
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.repository import ModelInstance

DecodedImage: TypeAlias = NDArray[np.uint8] | ImageError
"""The pixels of an image, (H, W, channels), or why it could not be read."""


async def decode_images(
    images: Sequence[bytes],
    decoder: ImageDecoder,
    instance: ModelInstance,
    max_pixels: int,
    deadline: Deadline,
    is_disconnected: Callable[[], bool],
) -> list[DecodedImage]:
    """Decode image files, one after the other.

    Images that the model resizes itself are all in memory at full size, and at the size before the crop, so
    `max_pixels` limits them together.

    Args:
        images: the contents of the files, at least one.
        decoder: decodes them.
        instance: the model that they are for.
        max_pixels: the maximum number of pixels per image; of all images together if the model resizes them itself.
        deadline: when the request must be answered.
        is_disconnected: returns whether the client has disconnected.

    Raises:
        QueueFull: the queue of the model has no capacity for the images.
        DecoderUnavailable, DeadlineExceeded, RequestCancelled: as for `ImageDecoder.decode`.
    """
    instance.require_capacity(len(images))  # before decoding: a request that is refused should cost little
    spec, pixels_left = instance.model.spec, max_pixels
    decoded: list[DecodedImage] = []
    for data in images:
        try:
            pixels = await decoder.decode(data, spec, pixels_left, deadline, is_disconnected)
        except ImageError as error:
            decoded.append(error)
        else:
            decoded.append(pixels)
            if spec.embedded_preprocessing:
                height, width, _ = pixels.shape
                pixels_left = max(0, pixels_left - peak_pixels(width, height, spec.input))
    return decoded


async def decode_batch(
    images: Sequence[bytes],
    decoder: ImageDecoder,
    instance: ModelInstance,
    max_pixels: int,
    deadline: Deadline,
    is_disconnected: Callable[[], bool],
) -> NDArray[np.uint8]:
    """Decode image files to one batch, uint8 (N, H, W, channels), that `ModelInstance.infer` takes.

    The arguments and errors are those of `decode_images`.

    Raises:
        ImageError: an image cannot be read, or the model takes images of any size and these have several sizes.
        TooManyPixels, SlowImage: an image exceeds a limit.
    """
    decoded = await decode_images(images, decoder, instance, max_pixels, deadline, is_disconnected)
    pixels: list[NDArray[np.uint8]] = []
    for index, image in enumerate(decoded):
        if isinstance(image, ImageError):
            raise type(image)(f"image {index}: {image.problem}", image.remedy)
        if image.shape != (expected := pixels[0].shape if pixels else image.shape):
            height, width, _ = image.shape
            problem = f"image {index} has {width} x {height} pixels and image 0 {expected[1]} x {expected[0]}"
            raise ImageError(problem, "send images of different sizes in requests of their own")
        pixels.append(image)
    return stack_images(pixels)


def stack_images(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return images of one shape as a batch, (N, H, W, channels); that of one image shares its memory."""
    return images[0][None] if len(images) == 1 else np.stack(images)
