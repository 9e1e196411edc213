"""Image classification: decode the images of a request, run them through a model, and rank the classes."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import ImageError
from cifarx_serve.predictor import Prediction
from cifarx_serve.server.inference.batcher import InferenceResult
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.image_batch import DecodedImage, decode_images, stack_images
from cifarx_serve.server.inference.repository import ModelInstance


class Classification(NamedTuple):
    """The result of a classification request.

    Attributes:
        predictions: one per image, in order; the error of an image that could not be read.
        decode_started_at: when decoding began, on the clock of `time.perf_counter`.
        decode_s: how long decoding took, in seconds.
        inferences: the results of the model: one, or one for each size of the images.
    """

    predictions: list[Prediction | ImageError]
    decode_started_at: float
    decode_s: float
    inferences: list[InferenceResult]

    @property
    def queue_s(self) -> float:
        """The longest time that images of the request were queued, in seconds."""
        return max(result.queue_s for result in self.inferences)

    @property
    def compute_s(self) -> float:
        """The longest time that the model took for a batch with images of the request, in seconds."""
        return max(result.compute_s for result in self.inferences)


class ImageClassifier:
    """Classifies the images of requests.

    Args:
        decoder: decodes the images.
        max_pixels: the maximum number of pixels per image; of all images of a request together if the model resizes
            them itself.
    """

    def __init__(self, decoder: ImageDecoder, max_pixels: int) -> None:
        self._decoder = decoder
        self._max_pixels = max_pixels

    async def classify(
        self,
        images: Sequence[bytes],
        instance: ModelInstance,
        top_k: int,
        deadline: Deadline,
        is_disconnected: Callable[[], bool],
    ) -> Classification:
        """Classify the image files of one request.

        Args:
            images: the contents of the files, at least one.
            instance: the model.
            top_k: the number of classes per image.
            deadline: when the request must be answered.
            is_disconnected: returns whether the client has disconnected.

        Raises:
            ImageError: no image could be classified; the error is that of the first one.
            InferenceError: the queue is full, the deadline has passed, or the model cannot run on the images.
            RequestCancelled: the client has disconnected.
        """
        started_at = time.perf_counter()
        decoded = await decode_images(images, self._decoder, instance, self._max_pixels, deadline, is_disconnected)
        decode_s = time.perf_counter() - started_at
        batches = _batches(decoded)
        pending = [instance.infer(batch, deadline, is_disconnected) for _, batch in batches]
        results = [await pending[0]] if len(pending) == 1 else await asyncio.gather(*pending)
        spec = instance.model.spec
        predictions: list[Any] = list(decoded)  # the pixels of each image are replaced by its prediction
        for (indices, _), result in zip(batches, results, strict=True):
            for index, prediction in zip(indices, result.top_predictions(spec, top_k), strict=True):
                predictions[index] = prediction
        if all(isinstance(prediction, ImageError) for prediction in predictions):
            raise predictions[0]
        return Classification(predictions, started_at, decode_s, results)


def _batches(decoded: Sequence[DecodedImage]) -> list[tuple[list[int], NDArray[np.uint8]]]:
    """Stack the readable images of each shape; return every batch, (N, H, W, channels), with the indices of its images.

    Raises:
        ImageError: there is no readable image; the error is that of the first one.
    """
    groups: dict[tuple[int, ...], tuple[list[int], list[NDArray[np.uint8]]]] = {}
    for index, image in enumerate(decoded):
        if not isinstance(image, ImageError):
            indices, images = groups.setdefault(image.shape, ([], []))
            indices.append(index)
            images.append(image)
    if not groups:
        raise next(error for error in decoded if isinstance(error, ImageError))
    return [(indices, stack_images(images)) for indices, images in groups.values()]
