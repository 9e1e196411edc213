"""A served model: loaded, verified and warmed up before it answers any request."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend, require_interface, run_checked
from cifarx_serve.backends.registry import model_file, open_backend
from cifarx_serve.errors import CifarxError, ModelFileError, error_message
from cifarx_serve.files.regular_file import open_regular_file
from cifarx_serve.images.preprocess import model_input, pixels_to_input
from cifarx_serve.server.model_files import parse_key
from cifarx_serve.spec import ModelSpec

_VERSION_DIGITS: Final = 12


class ModelInfo(msgspec.Struct, frozen=True):
    """A served model. `version` is the start of the file's SHA-256; `provider` is what runs the model.

    `number` is the number of its version, if it was given one.

    `assumption` says, after the word ASSUMED, what was stated neither by the file nor by the user; null if all was.
    """

    name: str
    version: str
    file: str
    backend: str
    provider: str
    ready: bool
    loaded_at: str
    spec: ModelSpec
    assumption: str | None
    number: int | None = None


class ServedModel:
    """One version of one model. One thread at a time may call `run`.

    Attributes:
        key: the key of its file, which is the name, or NAME@2 for version 2.
        name: the name that it is served under.
        number: the number of its version; None if it has none.
        version: the start of the SHA-256 of its file.
        failed: whether the model fails on every input.

    Args:
        key: the key of its file.
        path: the model file.
        backend: the backend's name; by default the suffix of the file selects it.
        device: the device, as users write it.
        max_batch: the largest batch it will be run with.
        on_step: called when the file is open, and after each batch of the warm-up.
        public_key: the file of the public key with which the model must be signed; None if it need not be.

    Raises:
        ModelFileError: the file is missing, damaged or not signed, or the model does not return valid outputs.
        DeviceError: the device is not available.
    """

    def __init__(
        self,
        key: str,
        path: str,
        backend: str | None,
        device: str,
        max_batch: int,
        on_step: Callable[[], None] = lambda: None,
        public_key: str | None = None,
    ) -> None:
        _verify_signature(path, public_key)
        file = model_file(Path(path))
        self.key = key
        self.name, self.number = parse_key(key)
        self.version = file_version(path)
        self._backend: Backend = open_backend(file, backend, device)
        self._file = file.name
        self._loaded_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._max_batch = max_batch
        self.failed = False
        try:
            _verify_signature(path, public_key)  # it may have been replaced while it was opened
            require_interface(self._backend, self._file)
            on_step()
            self.warm_up(on_step)
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> ModelSpec:
        """The model's spec, from its file."""
        return self._backend.spec

    @property
    def protocol_version(self) -> str:
        """The version in the Open Inference Protocol: the number if the model has one, otherwise `version`."""
        return self.version if self.number is None else str(self.number)

    def has_version(self, version: str) -> bool:
        """Return whether a client means this version: its number, or `version`; 1 is the only one without a number."""
        return version in (self.version, str(self.number or 1))

    @property
    def platform(self) -> str:
        """The format and the runtime, as the Open Inference Protocol names platforms: `onnx_onnxruntime`."""
        return f"{Path(self._file).suffix.lstrip('.') or 'model'}_{self._backend.name}"

    @property
    def has_predictable_latency(self) -> bool:
        """Whether the model runs on this process's CPUs, and all its images have one size and take about as long."""
        return self._backend.runs_on_own_cpus and not self.spec.embedded_preprocessing

    def info(self) -> ModelInfo:
        """Return the description of the model that the server publishes."""
        return ModelInfo(
            self.name,
            self.version,
            self._file,
            self._backend.name,
            self._backend.provider,
            not self.failed,
            self._loaded_at,
            self.spec,
            self.spec.assumption,
            self.number,
        )

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return the output of the model for a batch, float32 (N, output_size).

        Args:
            images: pixels, uint8 (N, H, W, channels), of the model's input size unless it resizes them itself; or the
                preprocessed input of the network, float32 (N, *spec.input.shape).

        Raises:
            CifarxError: the model cannot run on them. `failed` is then set if it cannot run on anything else either.
        """
        try:
            if images.dtype == np.uint8:
                images = pixels_to_input(images, self.spec)
            outputs = self._run_backend(images)
        except CifarxError:
            self._check_health()
            raise
        self.failed = False
        return outputs

    def gray_images(self, count: int = 1) -> NDArray[np.uint8]:
        """Return gray images that a working model can run on: pixels, uint8 (count, height, width, channels)."""
        size = self.spec.input
        return np.full((count, size.height, size.width, size.channels), 127, np.uint8)

    def warm_up(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Run batches of the sizes to come, and check that the outputs are finite and have the shape of the spec.

        Args:
            on_step: called after each batch.

        Raises:
            ModelFileError: they do not, or are not.
        """
        for size in _warm_up_sizes(self._max_batch):
            outputs = self._run_backend(model_input(self.gray_images(size), self.spec))
            if not np.isfinite(outputs).all():
                problem = f"{self._file} returns {self.spec.output} that are not finite for a batch of {size}"
                raise ModelFileError(problem, "export it again")
            on_step()

    def close(self) -> None:
        """Release the model's resources."""
        self._backend.close()

    def _check_health(self) -> None:
        """After a failure, find out whether the images were the cause or the model fails on everything."""
        try:
            self._run_backend(model_input(self.gray_images(), self.spec))
        except CifarxError:
            self.failed = True

    def _run_backend(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        return run_checked(self._backend, batch, self._file)


def _warm_up_sizes(largest: int) -> list[int]:
    """Return the powers of two up to `largest`, and `largest`: runtimes allocate and choose kernels per batch size."""
    return sorted({1 << bits for bits in range(largest.bit_length())} | {largest})


def _verify_signature(path: str, public_key: str | None) -> None:
    if public_key is not None:
        from cifarx_serve.files.signature import Verifier  # its libraries take 0.5 s to import

        Verifier(Path(public_key)).verify(Path(path))


def file_version(path: str) -> str:
    """Return the version of a model file: the start of its SHA-256.

    Raises:
        ModelFileError: the file cannot be read.
    """
    file = model_file(Path(path))
    try:
        with open_regular_file(file) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()[:_VERSION_DIGITS]
    except OSError as error:
        raise ModelFileError(f"cannot read {file} ({error_message(error)})", "check the path") from error
