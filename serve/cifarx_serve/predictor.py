"""From an image to a label: a model file, opened, with its own preprocessing and class names."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, overload

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

BATCH: Final = 64
"""Images of a stream that go through the model together."""

_EMBEDDED_BATCH: Final = 8
"""The same where a file takes pictures as they are: these may be large."""


class Candidate(msgspec.Struct, frozen=True):
    """One class with its softmax score, 0 to 1."""

    label: str
    index: int
    score: float


class Prediction(msgspec.Struct, frozen=True, omit_defaults=True):
    """The best class of one image, and the `top` classes, best first; `logits`, a class each, where asked for."""

    label: str
    index: int
    score: float
    top: tuple[Candidate, ...]
    logits: tuple[float, ...] | None = None


class Predictor:
    """An opened model file that classifies images; a context manager. Made by `load`.

    Any number of threads may use it at a time.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._for_threads: Backend | None = None
        taken = backend.spec.input
        self._ready = None if backend.spec.embedded_preprocessing else (taken.height, taken.width, 3)

    @property
    def spec(self) -> ModelSpec:
        """What the file says about itself."""
        return self._backend.spec

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self._backend.name

    @property
    def provider(self) -> str:
        """What really runs the model."""
        return self._backend.provider

    @overload
    def predict(self, image: ImageSource, top_k: int = 1, *, logits: bool = False) -> Prediction: ...

    @overload
    def predict(
        self, image: list[ImageSource] | tuple[ImageSource, ...], top_k: int = 1, *, logits: bool = False
    ) -> list[Prediction]: ...

    def predict(
        self,
        image: "ImageSource | list[ImageSource] | tuple[ImageSource, ...]",
        top_k: int = 1,
        *,
        logits: bool = False,
    ) -> Prediction | list[Prediction]:
        """Classify one image, or a list of them together.

        Args:
            image: a path, the bytes of an image file, a Pillow image, or a uint8 array of shape (H, W), (H, W, 3) or
                (H, W, 4); or a list or tuple of these.
            top_k: how many classes to give, 1 to the number of classes.
            logits: give those too.

        Returns:
            A prediction; for a list, as many in its order.

        Raises:
            ImageError: one cannot be read as an image.
            UsageError: `top_k` is out of range.
        """
        self._require_top_k(top_k)
        if isinstance(image, list | tuple):
            return self._classify([self._pixels(one) for one in image], self._backend, top_k, logits)
        return self._classify([self._pixels(image)], self._backend, top_k, logits)[0]

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Logits, (N, classes), of a batch that is ready.

        Args:
            batch: float32 (N, 3, height, width), scaled and normalized as the spec has it; for a file that does its
                own preprocessing uint8 (N, H, W, 3).

        Raises:
            UsageError: it has another shape or dtype.
        """
        expected = self.spec.input
        if self._ready is None:
            fits = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[3] == 3 and batch.size > 0
        else:
            shape = (expected.channels, expected.height, expected.width)
            fits = batch.dtype == np.float32 and batch.shape[1:] == shape and len(batch) > 0
        if not fits:
            asked = "uint8 (N, H, W, 3)" if self._ready is None else f"float32 (N, {', '.join(map(str, shape))})"
            raise UsageError(f"a batch of {batch.dtype} {batch.shape}", f"the model takes {asked}")
        return self._backend.run(batch)

    def predict_stream(self, images: Iterable[ImageSource], top_k: int = 1) -> Iterator[Prediction | ImageError]:
        """Classify any number of images in bounded memory, decoded ahead in threads; answers in the order given.

        An image that cannot be read gives its error in place of an answer, and does not stop the others.

        Raises:
            UsageError: `top_k` is out of range.
        """
        self._require_top_k(top_k)
        return self._stream(images, top_k)

    def _stream(self, images: Iterable[ImageSource], top_k: int) -> Iterator[Prediction | ImageError]:
        """Each thread has a batch decoded and runs it: no thread waits for another, and none is shared."""
        from cifarx_serve.images.decode_pool import DecodingProcesses
        from cifarx_serve.system.prefetch import ahead  # threads take 15 ms to import, and one image needs none

        if self._for_threads is None:
            self._for_threads = self._backend.single_threaded()
        backend, threads = self._for_threads, available_cpus()
        batch = BATCH if self._ready else _EMBEDDED_BATCH
        with closing(DecodingProcesses(self.spec.input, threads if self._ready else 0)) as processes:

            def classify(part: list[ImageSource]) -> list[Prediction | ImageError]:
                read = processes.decode(part) or [self._pixels_or_error(image) for image in part]
                good = [pixels for pixels in read if not isinstance(pixels, ImageError)]
                answers = iter(self._classify(good, backend, top_k))
                return [entry if isinstance(entry, ImageError) else next(answers) for entry in read]

            yield from ahead(classify, images, threads, batch)

    def _pixels_or_error(self, image: ImageSource) -> NDArray[np.uint8] | ImageError:
        try:
            return self._pixels(image)
        except ImageError as error:
            return error

    def _pixels(self, image: ImageSource) -> NDArray[np.uint8]:
        """RGB, (H, W, 3): at the network's size, or as they are for a file that does its own preprocessing."""
        if isinstance(image, np.ndarray) and image.shape == self._ready and image.dtype == np.uint8:
            return image  # nothing to read and nothing to resize
        picture = read_image(image)
        return np.asarray(picture) if self.spec.embedded_preprocessing else resize(picture, self.spec.input)

    def _require_top_k(self, top_k: int) -> None:
        classes = len(self.spec.class_names)
        if not 1 <= top_k <= classes:
            raise UsageError(f"top-k is {top_k}", f"the model has {classes} classes: give 1 to {classes}")

    def _classify(
        self, images: Sequence[NDArray[np.uint8]], backend: Backend, top_k: int, with_logits: bool = False
    ) -> list[Prediction]:
        """Of images as `_pixels` gives them."""
        if not images:
            return []
        logits = self._logits(images, backend)
        found = predictions(logits, self.spec.class_names, top_k)
        if not with_logits:
            return found
        rows = zip(found, logits.tolist(), strict=True)
        return [msgspec.structs.replace(prediction, logits=tuple(row)) for prediction, row in rows]

    def _logits(self, images: Sequence[NDArray[np.uint8]], backend: Backend) -> NDArray[np.float32]:
        """Those of one size go together."""
        if len(images) == 1:
            return backend.run(model_input(images[0][None], self.spec))
        positions: dict[tuple[int, ...], list[int]] = {}
        for position, image in enumerate(images):
            positions.setdefault(image.shape, []).append(position)
        logits = np.empty((len(images), len(self.spec.class_names)), np.float32)
        for same_size in positions.values():
            batch = np.stack([images[position] for position in same_size])
            logits[same_size] = backend.run(model_input(batch, self.spec))
        return logits

    def close(self) -> None:
        """Give back what the model file holds open."""
        self._backend.close()
        if self._for_threads is not None:
            self._for_threads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(path: str | Path, backend: str | None = None, device: str = "auto") -> Predictor:
    """Open a model file for prediction.

    Args:
        path: a checkpoint or artifact.
        backend: the backend's name; by default the file's suffix says it.
        device: auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N or mps.

    Raises:
        UsageError: no such backend or device.
        ModelFileError: the file is absent or cannot be run.
        DeviceError: the device cannot be had.
    """
    return Predictor(open_backend(path, backend, device))


def predictions(logits: NDArray[np.float32], class_names: Sequence[str], top_k: int) -> list[Prediction]:
    """What logits, (N, classes), say: N predictions with the best `top_k` classes each."""
    # By the logits, which softmax may round to equals; stable: of equals the first, as argmax has it.
    best = (-logits).argsort(axis=1, kind="stable")[:, :top_k]
    scores = softmax(logits)[np.arange(len(logits))[:, None], best].tolist()
    return [_prediction(*row, class_names) for row in zip(best.tolist(), scores, strict=True)]


def _prediction(best: list[int], scores: list[float], names: Sequence[str]) -> Prediction:
    top = tuple([Candidate(names[index], index, score) for index, score in zip(best, scores, strict=True)])
    return Prediction(top[0].label, top[0].index, top[0].score, top)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scores that sum to 1 along the last axis, in double precision, safe for large logits."""
    highest = np.maximum.reduce(logits, axis=-1, keepdims=True)
    exponentials: NDArray[np.float64] = np.exp(np.subtract(logits, highest, dtype=np.float64))
    exponentials /= np.add.reduce(exponentials, axis=-1, keepdims=True)
    return exponentials
