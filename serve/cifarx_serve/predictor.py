"""From an image to a label: a model file, opened, with its own preprocessing and class names."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.images import ImageSource, read_image
from cifarx_serve.preprocess import model_input, resize
from cifarx_serve.spec import ModelSpec
from cifarx_serve.threads import available_cpus

BATCH: Final = 64
"""Images of a stream that go through the model together."""

_EMBEDDED_BATCH: Final = 8
"""The same where a file takes pictures as they are: these may be large."""


class Candidate(msgspec.Struct, frozen=True):
    """One class with its softmax score, 0 to 1."""

    label: str
    index: int
    score: float


class Prediction(msgspec.Struct, frozen=True):
    """The best class of one image, and the `top` classes, best first."""

    label: str
    index: int
    score: float
    top: tuple[Candidate, ...]


class Predictor:
    """An opened model file that classifies images; a context manager. Made by `load`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._for_threads: Backend | None = None

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

    def predict(self, image: ImageSource, top_k: int = 1) -> Prediction:
        """Classify one image.

        Args:
            image: a path, the bytes of an image file, a Pillow image, or a uint8 array.
            top_k: how many classes to give, 1 to the number of classes.

        Raises:
            ImageError: it cannot be read as an image.
            UsageError: `top_k` is out of range.
        """
        return self.predict_batch([image], top_k)[0]

    def predict_batch(self, images: Sequence[ImageSource], top_k: int = 1) -> list[Prediction]:
        """Classify images together, in the order given; raises as `predict` does."""
        self._require_top_k(top_k)
        return self._predictions([self._pixels(image) for image in images], top_k, self._backend)

    def predict_stream(self, images: Iterable[ImageSource], top_k: int = 1) -> Iterator[Prediction | ImageError]:
        """Classify any number of images in bounded memory, decoded ahead in threads; answers in the order given.

        An image that cannot be read gives its error in place of an answer, and does not stop the others.

        Raises:
            UsageError: `top_k` is out of range.
        """
        self._require_top_k(top_k)
        return self._stream(images, top_k)

    def _stream(self, images: Iterable[ImageSource], top_k: int) -> Iterator[Prediction | ImageError]:
        """Each thread decodes a batch and runs it: no thread waits for another, and none is shared."""
        from cifarx_serve.ahead import ahead  # threads take 15 ms to import, and one image needs none

        if self._for_threads is None:
            self._for_threads = self._backend.for_threads()
        backend = self._for_threads

        def classify(part: list[ImageSource]) -> list[Prediction | ImageError]:
            read = [self._pixels_or_error(image) for image in part]
            good = [pixels for pixels in read if not isinstance(pixels, ImageError)]
            answers = iter(self._predictions(good, top_k, backend))
            return [entry if isinstance(entry, ImageError) else next(answers) for entry in read]

        batch = _EMBEDDED_BATCH if self.spec.embedded_preprocessing else BATCH
        return ahead(classify, images, available_cpus(), batch)

    def _pixels_or_error(self, image: ImageSource) -> NDArray[np.uint8] | ImageError:
        try:
            return self._pixels(image)
        except ImageError as error:
            return error

    def _pixels(self, image: ImageSource) -> NDArray[np.uint8]:
        """RGB, (H, W, 3): at the network's size, or as they are for a file that does its own preprocessing."""
        picture = read_image(image)
        return np.asarray(picture) if self.spec.embedded_preprocessing else resize(picture, self.spec.input)

    def _require_top_k(self, top_k: int) -> None:
        classes = len(self.spec.class_names)
        if not 1 <= top_k <= classes:
            raise UsageError(f"top-k is {top_k}", f"the model has {classes} classes: give 1 to {classes}")

    def _predictions(self, images: Sequence[NDArray[np.uint8]], top_k: int, backend: Backend) -> list[Prediction]:
        """Of images as `_pixels` gives them; those of one size go together."""
        if not images:
            return []
        positions: dict[tuple[int, ...], list[int]] = {}
        for position, image in enumerate(images):
            positions.setdefault(image.shape, []).append(position)
        logits = np.empty((len(images), len(self.spec.class_names)), np.float32)
        for same_size in positions.values():
            batch = np.stack([images[position] for position in same_size])
            logits[same_size] = backend.run(model_input(batch, self.spec))
        # By the logits, which softmax may round to equals; stable: of equals the first, as argmax has it.
        best = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
        scores = np.take_along_axis(softmax(logits), best, axis=1)
        return [self._prediction(*row) for row in zip(best.tolist(), scores.tolist(), strict=True)]

    def _prediction(self, best: list[int], scores: list[float]) -> Prediction:
        names = self.spec.class_names
        top = tuple(Candidate(names[index], index, score) for index, score in zip(best, scores, strict=True))
        return Prediction(top[0].label, top[0].index, top[0].score, top)

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
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UsageError: no such backend or device.
        ModelFileError: the file is absent or cannot be run.
        DeviceError: the device cannot be had.
    """
    return Predictor(open_backend(path, backend, device))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scores that sum to 1 along the last axis, in double precision, safe for large logits."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    scores: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return scores
