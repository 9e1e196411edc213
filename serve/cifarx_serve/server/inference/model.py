"""A model file in service: opened, checked and warmed before it answers anybody, and replaced the same way."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import model_file, open_backend
from cifarx_serve.errors import CifarxError, ModelFileError
from cifarx_serve.files.checksum import SealState, read_seal
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.spec import ModelSpec

_VERSION_DIGITS: Final = 12


class ModelRecord(msgspec.Struct, frozen=True):
    """What the server says about a model: `version` is the start of the file's sha256."""

    name: str
    version: str
    file: str
    backend: str
    provider: str
    ready: bool
    loaded_at: str
    spec: ModelSpec


class ServedModel:
    """One version of one model; `run` is called by one thread at a time.

    `failed` says that it answers nothing any more, whatever it is asked.

    Args:
        name: it is served under.
        path: of the file.
        backend: the backend's name; None for the one that the suffix asks for.
        device: as users write it.
        max_batch: the largest batch it will be given.

    Raises:
        ModelFileError: the file is absent, damaged, or does not answer as it should.
        DeviceError: the device cannot be had.
    """

    def __init__(self, name: str, path: str, backend: str | None, device: str, max_batch: int) -> None:
        file = model_file(Path(path))
        self.name = name
        self.version = file_version(path)
        if read_seal(file).state is SealState.CHANGED:
            raise ModelFileError(f"{file} is not as it was exported: its seal is broken", "copy or export it again")
        self._backend: Backend = open_backend(file, backend, device)
        self._file = file.name
        self._loaded_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._max_batch = max_batch
        self.failed = False
        try:
            self.warm_up()
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> ModelSpec:
        """What the file says about itself."""
        return self._backend.spec

    @property
    def platform(self) -> str:
        """What runs it, as the Open Inference Protocol names it: format and library."""
        return f"{Path(self._file).suffix.lstrip('.') or 'model'}_{self._backend.name}"

    @property
    def is_steady(self) -> bool:
        """Whether it takes this process's own CPUs, for every image about as long: its images have one size."""
        return self._backend.provider == "CPUExecutionProvider" and not self.spec.embedded_preprocessing

    def record(self) -> ModelRecord:
        """What there is to say about it."""
        return ModelRecord(
            self.name,
            self.version,
            self._file,
            self._backend.name,
            self._backend.provider,
            not self.failed,
            self._loaded_at,
            self.spec,
        )

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits, float32 (N, classes).

        Args:
            images: RGB pixels, uint8 (N, H, W, 3), at the model's size where it does not resize them itself; or what
                its network takes, float32 (N, 3, height, width).

        Raises:
            CifarxError: the model does not run on them.
        """
        try:
            if images.dtype == np.uint8:
                images = model_input(images, self.spec)
            logits = self._logits(images)
        except CifarxError:
            self._test()
            raise
        self.failed = False
        return logits

    def grey_image(self, count: int = 1) -> NDArray[np.uint8]:
        """Images that it must be able to answer: RGB pixels, (count, height, width, 3)."""
        return np.full((count, self.spec.input.height, self.spec.input.width, 3), 127, np.uint8)

    def warm_up(self) -> None:
        """Answer batches of the sizes to come, and see that the answers are some.

        Raises:
            ModelFileError: they are not.
        """
        for size in _warm_sizes(self._max_batch):
            logits = self._logits(model_input(self.grey_image(size), self.spec))
            if logits.shape != (size, len(self.spec.class_names)) or not np.isfinite(logits).all():
                problem = (
                    f"{self._file} answers {size} grey images with {logits.dtype} {logits.shape}, or not with numbers"
                )
                raise ModelFileError(problem, "export it again")

    def close(self) -> None:
        """Give back what it holds."""
        self._backend.close()

    def _test(self) -> None:
        """After a failure: whether it was the request's images, or the model answers nothing any more."""
        try:
            self._logits(model_input(self.grey_image(), self.spec))
        except CifarxError:
            self.failed = True

    def _logits(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Whatever the backend raises, as ModelFileError."""
        try:
            return self._backend.run(batch)
        except CifarxError:
            raise
        except Exception as error:  # what the libraries raise, as on a device that is lost, has no common base
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = f"{self._file} does not run on {batch.dtype} {batch.shape} ({reason})"
            raise ModelFileError(problem, "export it again") from error


def _warm_sizes(largest: int) -> list[int]:
    """The powers of two, at which memory is bound and kernels are chosen where that is done a size, and the largest."""
    return sorted({1 << bits for bits in range(largest.bit_length())} | {largest})


def file_version(path: str) -> str:
    """The start of the file's sha256.

    Raises:
        ModelFileError: it cannot be read.
    """
    file = model_file(Path(path))
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()[:_VERSION_DIGITS]
    except OSError as error:
        raise ModelFileError(f"cannot read {file} ({error.strerror or error})", "check the path") from error
