"""The Python API for inference: opens a model file and classifies images with its own preprocessing and class names."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.images.preprocess import model_input, resize
from cifarx_serve.images.reader import ImageSource, read_image
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import available_cpus

_STREAM_BATCH: Final = 64
"""The batch size for streams."""

_EMBEDDED_STREAM_BATCH: Final = 8
"""The batch size for models with embedded preprocessing, whose input images can be large."""

_ImageSource = TypeVar("_ImageSource", bound=ImageSource)


class Candidate(msgspec.Struct, frozen=True):
    """One class and its softmax score, from 0 to 1."""

    label: str
    index: int
    score: float


class Prediction(msgspec.Struct, frozen=True, omit_defaults=True):
    """The prediction for one image.

    Attributes:
        label: the name of the best class.
        index: the index of the best class.
        score: the softmax score of the best class, from 0 to 1.
        top: the `top_k` best classes, best first.
        logits: the logit of each class, if they were requested.
    """

    label: str
    index: int
    score: float
    top: tuple[Candidate, ...]
    logits: tuple[float, ...] | None = None


class Predictor:
    """A model file that is open for inference. Use `load` to create one.

    A predictor is a context manager, and any number of threads can use it at once.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._single_threaded: Backend | None = None
        spec = backend.spec.input
        self._input_shape = None if backend.spec.embedded_preprocessing else (spec.height, spec.width, 3)

    @property
    def spec(self) -> ModelSpec:
        """The model spec in the file."""
        return self._backend.spec

    @property
    def backend(self) -> str:
        """The name of the backend."""
        return self._backend.name

    @property
    def provider(self) -> str:
        """What runs the model, as the runtime reports it."""
        return self._backend.provider

    @overload
    def predict(self, image: ImageSource, top_k: int = 1, *, logits: bool = False) -> Prediction: ...

    @overload
    def predict(
        self, image: list[ImageSource] | tuple[ImageSource, ...], top_k: int = 1, *, logits: bool = False
    ) -> list[Prediction]: ...

    @overload
    def predict(self, image: list[_ImageSource], top_k: int = 1, *, logits: bool = False) -> list[Prediction]: ...

    def predict(
        self,
        image: "ImageSource | list[ImageSource] | list[_ImageSource] | tuple[ImageSource, ...]",
        top_k: int = 1,
        *,
        logits: bool = False,
    ) -> Prediction | list[Prediction]:
        """Classify one image, or a list of images as one batch.

        Args:
            image: a path, the content of an image file, a Pillow image, or a uint8 array of shape (H, W), (H, W, 3) or
                (H, W, 4); or a list or tuple of these.
            top_k: the number of classes to return, from 1 to the number of classes.
            logits: whether to return the logits too.

        Returns:
            One prediction, or a list of predictions in the order of the images.

        Raises:
            ImageError: an image cannot be read.
            UsageError: `top_k` is out of range.
        """
        self._require_top_k(top_k)
        if isinstance(image, list | tuple):
            return self._classify([self._pixels(source) for source in image], self._backend, top_k, logits)
        return self._classify([self._pixels(image)], self._backend, top_k, logits)[0]

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits, float32 (N, classes), of a batch that is already preprocessed.

        Args:
            batch: float32 (N, 3, height, width), scaled and normalized according to the spec; or uint8 (N, H, W, 3) for
                a model with embedded preprocessing.

        Raises:
            UsageError: the batch has a wrong shape or dtype.
        """
        spec = self.spec.input
        if self._input_shape is None:
            valid = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[3] == 3 and batch.size > 0
        else:
            shape = (spec.channels, spec.height, spec.width)
            valid = batch.dtype == np.float32 and batch.shape[1:] == shape and len(batch) > 0
        if not valid:
            wanted = "uint8 (N, H, W, 3)" if self._input_shape is None else f"float32 (N, {', '.join(map(str, shape))})"
            raise UsageError(f"the batch is {batch.dtype} {batch.shape}", f"the model takes {wanted}")
        return self._backend.run(batch)

    def predict_stream(self, images: Iterable[ImageSource], top_k: int = 1) -> Iterator[Prediction | ImageError]:
        """Classify a stream of any length in bounded memory. Images are decoded ahead in threads and processes.

        Predictions are yielded in the order of the images. For an image that cannot be read, the `ImageError` is
        yielded in place of a prediction, and the stream continues.

        Args:
            images: the images, of any kind that `predict` takes.
            top_k: as for `predict`.

        Raises:
            UsageError: `top_k` is out of range.
        """
        self._require_top_k(top_k)
        return self._stream(images, top_k)

    def _stream(self, images: Iterable[ImageSource], top_k: int) -> Iterator[Prediction | ImageError]:
        """Decode and run each batch in one thread, so that threads share no work and wait for nothing."""
        # Threads take 15 ms to import, and a single image needs none.
        from cifarx_serve.images.decode_pool import DecodePool
        from cifarx_serve.system.prefetch import prefetch_batches

        if self._single_threaded is None:
            self._single_threaded = self._backend.single_threaded()
        backend, threads = self._single_threaded, available_cpus()
        batch_size = _STREAM_BATCH if self._input_shape else _EMBEDDED_STREAM_BATCH
        with closing(DecodePool(self.spec.input, threads if self._input_shape else 0)) as pool:

            def classify(sources: list[ImageSource]) -> list[Prediction | ImageError]:
                decoded = pool.decode(sources) or [self._pixels_or_error(source) for source in sources]
                images = [pixels for pixels in decoded if not isinstance(pixels, ImageError)]
                predictions = iter(self._classify(images, backend, top_k))
                return [entry if isinstance(entry, ImageError) else next(predictions) for entry in decoded]

            yield from prefetch_batches(classify, images, threads, batch_size)

    def _pixels_or_error(self, image: ImageSource) -> NDArray[np.uint8] | ImageError:
        try:
            return self._pixels(image)
        except ImageError as error:
            return error

    def _pixels(self, image: ImageSource) -> NDArray[np.uint8]:
        """Return RGB pixels (H, W, 3), resized to the input size unless the preprocessing is embedded."""
        if isinstance(image, np.ndarray) and image.shape == self._input_shape and image.dtype == np.uint8:
            return image  # there is nothing to decode or resize
        decoded = read_image(image)
        return np.asarray(decoded) if self.spec.embedded_preprocessing else resize(decoded, self.spec.input)

    def _require_top_k(self, top_k: int) -> None:
        classes = len(self.spec.class_names)
        if not 1 <= top_k <= classes:
            raise UsageError(f"top-k is {top_k}", f"the model has {classes} classes: give 1 to {classes}")

    def _classify(
        self, images: Sequence[NDArray[np.uint8]], backend: Backend, top_k: int, with_logits: bool = False
    ) -> list[Prediction]:
        """Classify images that `_pixels` returned."""
        if not images:
            return []
        logits = self._logits(images, backend)
        predictions = top_predictions(logits, self.spec.class_names, top_k)
        if not with_logits:
            return predictions
        rows = zip(predictions, logits.tolist(), strict=True)
        return [msgspec.structs.replace(prediction, logits=tuple(row)) for prediction, row in rows]

    def _logits(self, images: Sequence[NDArray[np.uint8]], backend: Backend) -> NDArray[np.float32]:
        """Return the logits (N, classes); images of equal size are run as one batch."""
        if len(images) == 1:
            return backend.run(model_input(images[0][None], self.spec))
        positions: dict[tuple[int, ...], list[int]] = {}
        for position, image in enumerate(images):
            positions.setdefault(image.shape, []).append(position)
        logits = np.empty((len(images), len(self.spec.class_names)), np.float32)
        for indices in positions.values():
            batch = np.stack([images[index] for index in indices])
            logits[indices] = backend.run(model_input(batch, self.spec))
        return logits

    def close(self) -> None:
        """Release the model."""
        self._backend.close()
        if self._single_threaded is not None:
            self._single_threaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(path: str | Path, backend: str | None = None, device: str = "auto") -> Predictor:
    """Open a model file for inference.

    Args:
        path: a checkpoint or an artifact.
        backend: the name of the backend; by default it is chosen by the suffix of the file.
        device: auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N or mps.

    Raises:
        UsageError: the backend or the device is unknown.
        ModelFileError: the file does not exist or cannot be run.
        DeviceError: the device is not available.
    """
    return Predictor(open_backend(path, backend, device))


def top_predictions(logits: NDArray[np.float32], class_names: Sequence[str], top_k: int) -> list[Prediction]:
    """Return one prediction with the `top_k` best classes for each row of logits, (N, classes)."""
    # Sort by the logits, because softmax can round different ones to equal scores. A stable sort puts the first of
    # several equal logits first, as argmax does.
    best = (-logits).argsort(axis=1, kind="stable")[:, :top_k]
    scores = softmax(logits)[np.arange(len(logits))[:, None], best].tolist()
    return [_prediction(*row, class_names) for row in zip(best.tolist(), scores, strict=True)]


def _prediction(best: list[int], scores: list[float], names: Sequence[str]) -> Prediction:
    top = tuple([Candidate(names[index], index, score) for index, score in zip(best, scores, strict=True)])
    return Prediction(top[0].label, top[0].index, top[0].score, top)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return softmax scores along the last axis, in double precision and without overflow for large logits."""
    highest = np.maximum.reduce(logits, axis=-1, keepdims=True)
    exponentials: NDArray[np.float64] = np.exp(np.subtract(logits, highest, dtype=np.float64))
    exponentials /= np.add.reduce(exponentials, axis=-1, keepdims=True)
    return exponentials
