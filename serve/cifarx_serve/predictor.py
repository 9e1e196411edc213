"""From an image to a label: a model file, opened, with its own preprocessing and class names."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import UsageError
from cifarx_serve.images import ImageSource, read_image
from cifarx_serve.preprocess import preprocess
from cifarx_serve.spec import ModelSpec


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
        classes = len(self.spec.class_names)
        if not 1 <= top_k <= classes:
            raise UsageError(f"top-k is {top_k}", f"the model has {classes} classes: give 1 to {classes}")
        if not images:
            return []
        logits = self._logits([read_image(image) for image in images])
        return [self._prediction(*row, top_k) for row in zip(logits, softmax(logits), strict=True)]

    def _logits(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Of RGB pictures; a file that does its own preprocessing gets them as they are, those of one size together."""
        if not self.spec.embedded_preprocessing:
            return self._backend.run(preprocess(images, self.spec))
        positions: dict[tuple[int, int], list[int]] = {}
        for position, image in enumerate(images):
            positions.setdefault(image.size, []).append(position)
        logits = np.empty((len(images), len(self.spec.class_names)), np.float32)
        for same_size in positions.values():
            logits[same_size] = self._backend.run(np.stack([np.asarray(images[position]) for position in same_size]))
        return logits

    def _prediction(self, logits: NDArray[np.float32], scores: NDArray[np.float64], top_k: int) -> Prediction:
        # By the logits, which softmax may round to equals; stable: of equals the first, as argmax has it.
        best = np.argsort(-logits, kind="stable")[:top_k]
        names = self.spec.class_names
        top = tuple(Candidate(names[index], int(index), float(scores[index])) for index in best)
        return Prediction(top[0].label, top[0].index, top[0].score, top)

    def close(self) -> None:
        """Give back what the model file holds open."""
        self._backend.close()

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
