"""The Python API for inference: opens a model file and classifies images with its own preprocessing and class names."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeGuard, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend, require_interface, run_checked
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.images.preprocess import is_unchanged, model_pixels, pixels_to_input
from cifarx_serve.images.reader import ImageSource, read_image
from cifarx_serve.scores import applicable_labels, class_scores, predicted_classes
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import available_cpus

_BATCH: Final = 64
"""The batch size for lists and streams. Longer lists are streams."""

_EMBEDDED_BATCH: Final = 8
"""The batch size for models with embedded preprocessing, whose input images can be large."""

_BATCH_CHANNELS: Final = (1, 3, 4)


class Candidate(msgspec.Struct, frozen=True):
    """One class and its score, from 0 to 1."""

    label: str
    index: int
    score: float


class Prediction(msgspec.Struct, frozen=True, omit_defaults=True):
    """The prediction for one image.

    Attributes:
        label: the name of the best class.
        index: the index of the best class.
        score: the score of the best class, from 0 to 1: of a softmax, or of a sigmoid for a model with several labels.
        top: the `top_k` best classes, best first. Of two classes with one output, the predicted one is first.
        logits: the logits of the model, if they were requested.
        labels: the labels that apply, best first: those whose score reaches their threshold. It can be empty. None for
            a model with one label per image.
    """

    label: str
    index: int
    score: float
    top: tuple[Candidate, ...]
    logits: tuple[float, ...] | None = None
    labels: tuple[Candidate, ...] | None = None


class _Origin(NamedTuple):
    """The arguments of `load`, with an absolute path."""

    path: str
    backend: str | None
    device: str


class Predictor:
    """A model file that is open for inference. Use `load` to create one.

    A predictor is a context manager, and any number of threads can use it at once. Processes can use it too: a pickled
    predictor is the path, the backend and the device, and the file is opened again where it is unpickled.
    """

    def __init__(self, backend: Backend, origin: _Origin | None = None) -> None:
        self._backend = backend
        self._origin = origin
        self._single_threaded: Backend | None = None
        self._lock = Lock()
        self._embedded = backend.spec.embedded_preprocessing
        self._batch = _EMBEDDED_BATCH if self._embedded else _BATCH
        spec = backend.spec.input
        shape = (spec.height, spec.width, spec.channels)
        # Arrays of this shape need no preprocessing before `pixels_to_input`.
        self._pixel_shape = shape if is_unchanged(shape, spec) and not self._embedded else None

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
    def predict(self, image: ImageSource, top_k: int = 1, *, logits: bool = False) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def predict(
        self, image: Iterable[ImageSource], top_k: int = 1, *, logits: bool = False
    ) -> list[Prediction | ImageError]: ...

    def predict(
        self, image: "ImageSource | Iterable[ImageSource]", top_k: int = 1, *, logits: bool = False
    ) -> Prediction | list[Prediction | ImageError]:
        """Classify one image, or any number of images.

        Up to 64 images, or 8 for a model with embedded preprocessing, are one batch. More are classified as by
        `predict_stream`, so that memory does not grow with their number.

        Args:
            image: a path, the content of an image file, a binary file object, a Pillow image, or a uint8 array of shape
                (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). For several images, a list or another iterable of these, or a
                uint8 array of shape (N, H, W, C) with 1, 3 or 4 channels.
            top_k: the number of classes to return, from 1 to the number of classes.
            logits: whether to return the logits too.

        Returns:
            One prediction for one image. For several images, a list in their order, with an `ImageError` in place of
            the prediction for an image that cannot be read, or for which the model does not return numbers.

        Raises:
            ImageError: the only image, or the array of several images, cannot be read, or the model does not return
                numbers for it.
            UsageError: `top_k` is out of range, or logits are requested from a model that returns probabilities.
        """
        self._require_top_k(top_k)
        if logits and self.spec.output != "logits":
            raise UsageError("logits were requested, but the model returns probabilities", "use `run` for its output")
        if not _are_several(image):
            prediction = self._classify([self._pixels(image)], self._backend, top_k, logits)[0]  # type: ignore[arg-type]
            if isinstance(prediction, ImageError):
                raise prediction
            return prediction
        images = iter(image)
        first = list(islice(images, self._batch + 1))
        if len(first) <= self._batch:
            return self._classify_readable(map(self._pixels_or_error, first), self._backend, top_k, logits)
        return list(self._stream(chain(first, images), top_k, logits))

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Return the output of the model for a batch that is already preprocessed.

        Args:
            batch: float32 (N, *spec.input.shape), scaled and normalized according to the spec; or uint8
                (N, H, W, channels) for a model with embedded preprocessing.

        Returns:
            Logits or probabilities as the spec says, float32 (N, spec.output_size).

        Raises:
            UsageError: the batch has a wrong shape or dtype.
        """
        shape, channels = self.spec.input.shape, self.spec.input.channels
        if self._embedded:
            valid = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[3] == channels and batch.size > 0
        else:
            valid = batch.dtype == np.float32 and batch.shape[1:] == shape and len(batch) > 0
        if not valid:
            wanted = f"uint8 (N, H, W, {channels})" if self._embedded else f"float32 (N, {', '.join(map(str, shape))})"
            raise UsageError(f"the batch is {batch.dtype} {batch.shape}", f"the model takes {wanted}")
        return run_checked(self._backend, batch)

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

    def _stream(
        self, images: Iterable[ImageSource], top_k: int, with_logits: bool = False
    ) -> Iterator[Prediction | ImageError]:
        """Decode and run each batch in one thread, so that threads share no work and wait for nothing."""
        # Threads take 15 ms to import, and a single image needs none.
        from cifarx_serve.images.decode_pool import DecodePool
        from cifarx_serve.system.prefetch import prefetch_batches

        with self._lock:
            if self._single_threaded is None:
                self._single_threaded = self._backend.single_threaded()
        backend, threads = self._single_threaded, available_cpus()
        with closing(DecodePool(self.spec.input, 0 if self._embedded else threads)) as pool:

            def classify(sources: list[ImageSource]) -> list[Prediction | ImageError]:
                decoded = pool.decode(sources) or map(self._pixels_or_error, sources)
                return self._classify_readable(decoded, backend, top_k, with_logits)

            yield from prefetch_batches(classify, images, threads, self._batch)

    def _classify_readable(
        self, decoded: Iterable[NDArray[np.uint8] | ImageError], backend: Backend, top_k: int, with_logits: bool
    ) -> list[Prediction | ImageError]:
        """Classify the images that could be read, and keep the errors of the others in their places."""
        entries = list(decoded)
        images = [entry for entry in entries if not isinstance(entry, ImageError)]
        predictions = iter(self._classify(images, backend, top_k, with_logits))
        return [entry if isinstance(entry, ImageError) else next(predictions) for entry in entries]

    def _pixels_or_error(self, image: ImageSource) -> NDArray[np.uint8] | ImageError:
        try:
            return self._pixels(image)
        except ImageError as error:
            return error

    def _pixels(self, image: ImageSource) -> NDArray[np.uint8]:
        """Return the pixels of an image as `model_pixels` does."""
        if isinstance(image, np.ndarray) and image.shape == self._pixel_shape and image.dtype == np.uint8:
            return image
        return model_pixels(read_image(image), self.spec)

    def _require_top_k(self, top_k: int) -> None:
        classes = len(self.spec.class_names)
        if not 1 <= top_k <= classes:
            raise UsageError(f"top-k is {top_k}", f"the model has {classes} classes: give 1 to {classes}")

    def _classify(
        self, images: Sequence[NDArray[np.uint8]], backend: Backend, top_k: int, with_logits: bool = False
    ) -> list[Prediction | ImageError]:
        """Classify images that `_pixels` returned."""
        if not images:
            return []
        outputs = self._outputs(images, backend)
        predictions = top_predictions(outputs, self.spec, top_k)
        if not with_logits:
            return predictions
        rows = zip(predictions, outputs.tolist(), strict=True)
        return [
            prediction if isinstance(prediction, ImageError) else msgspec.structs.replace(prediction, logits=tuple(row))
            for prediction, row in rows
        ]

    def _outputs(self, images: Sequence[NDArray[np.uint8]], backend: Backend) -> NDArray[np.float32]:
        """Return the outputs (N, output_size); images of equal size are run as one batch."""
        if len(images) == 1:
            return run_checked(backend, pixels_to_input(images[0][None], self.spec))
        positions: dict[tuple[int, ...], list[int]] = {}
        for position, image in enumerate(images):
            positions.setdefault(image.shape, []).append(position)
        outputs = np.empty((len(images), self.spec.output_size), np.float32)
        for indices in positions.values():
            batch = np.stack([images[index] for index in indices])
            outputs[indices] = run_checked(backend, pixels_to_input(batch, self.spec))
        return outputs

    def close(self) -> None:
        """Release the model."""
        self._backend.close()
        if self._single_threaded is not None:
            self._single_threaded.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how to open the model again.

        Raises:
            UsageError: the predictor was not created by `load`.
        """
        if self._origin is None:
            raise UsageError("this predictor cannot be pickled: it has no path", "open a model file with `cifarx.load`")
        return load, tuple(self._origin)

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
        device: auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N, mps, gpu or npu.

    Raises:
        UsageError: the backend or the device is unknown.
        ModelFileError: the file does not exist or cannot be run.
        DeviceError: the device is not available.
    """
    opened = open_backend(path, backend, device)
    try:
        require_interface(opened, str(path))
    except BaseException:
        opened.close()
        raise
    return Predictor(opened, _Origin(os.path.abspath(path), backend, device))  # noqa: PTH100 - keeps symbolic links


def _are_several(image: object) -> TypeGuard[Iterable[ImageSource]]:
    """Return whether an argument of `Predictor.predict` stands for several images.

    Raises:
        ImageError: it is an array of several images with a wrong shape or dtype.
    """
    if isinstance(image, list | tuple):
        return True
    if isinstance(image, np.ndarray):
        return _is_batch(image)
    if isinstance(image, str | bytes | bytearray | memoryview | os.PathLike | Mapping) or hasattr(image, "read"):
        return False
    # Tensors and tables are iterable too. A series of pandas has one dimension, and is a list of images.
    return isinstance(image, Iterable) and getattr(image, "ndim", 1) == 1


def _is_batch(array: NDArray[Any]) -> bool:
    if array.ndim == 1:
        return array.dtype.kind in "OU"  # paths or other objects; bytes are the content of one file
    if array.ndim == 4 and (array.dtype != np.uint8 or array.shape[3] not in _BATCH_CHANNELS):
        raise ImageError(
            f"cannot take an array of shape {array.shape} and dtype {array.dtype} as images",
            "give uint8 of shape (N, H, W, 1), (N, H, W, 3) or (N, H, W, 4)",
        )
    return array.ndim == 4


def top_predictions(outputs: NDArray[np.float32], spec: ModelSpec, top_k: int) -> list[Prediction | ImageError]:
    """Return one prediction with the `top_k` best classes for each row of outputs, (N, output_size).

    A row whose scores are not numbers has an `ImageError` in place of its prediction.
    """
    scores = class_scores(outputs, spec)
    predictions: list[Prediction | ImageError] = [*_predictions(outputs, scores, spec, top_k)]
    if np.isnan(scores.sum()):
        for row in np.flatnonzero(np.isnan(scores).any(axis=1)).tolist():
            problem = "the model does not return numbers for the image"
            predictions[row] = ImageError(problem, "check the model with `cifarx verify`, or export it in fp32")
    return predictions


def _predictions(
    outputs: NDArray[np.float32], scores: NDArray[np.float64], spec: ModelSpec, top_k: int
) -> list[Prediction]:
    ranking = _rank(outputs, spec)
    if spec.multi_label:
        applicable = applicable_labels(outputs, spec).tolist()
        rows = zip(ranking.tolist(), scores.tolist(), applicable, strict=True)
        return [_multi_label_prediction(*row, spec.class_names, top_k) for row in rows]
    best = ranking[:, :top_k]
    best_scores = scores[np.arange(len(scores))[:, None], best].tolist()
    return [_prediction(*row, spec.class_names) for row in zip(best.tolist(), best_scores, strict=True)]


def _rank(outputs: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.int64]:
    """Return the classes of each image, best first, int64 (N, classes)."""
    if spec.outputs == 1:
        predicted = predicted_classes(outputs, spec)
        return np.stack([predicted, 1 - predicted], axis=1)
    # Sort by the outputs, because different ones can have equal scores. A stable sort puts the first of several equal
    # outputs first, as argmax does.
    return (-outputs).argsort(axis=1, kind="stable")


def _prediction(best: list[int], scores: list[float], names: Sequence[str]) -> Prediction:
    top = tuple([Candidate(names[index], index, score) for index, score in zip(best, scores, strict=True)])
    return Prediction(top[0].label, top[0].index, top[0].score, top)


def _multi_label_prediction(
    ranking: list[int], scores: list[float], applicable: list[bool], names: Sequence[str], top_k: int
) -> Prediction:
    candidates = [Candidate(names[index], index, scores[index]) for index in ranking]
    labels = tuple([candidate for candidate in candidates if applicable[candidate.index]])
    best = candidates[0]
    return Prediction(best.label, best.index, best.score, tuple(candidates[:top_k]), labels=labels)
