"""The base class of all backends."""

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError
from cifarx_serve.spec import ModelSpec


class TensorInfo(NamedTuple):
    """An input or output of a model.

    Attributes:
        name: the name in the model file.
        dtype: the name of the numpy dtype.
        shape: the size of each axis; a name for an axis of variable size.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Backend(ABC):
    """A model file that is open on a device. Backends are context managers.

    A subclass should import its runtime in `__init__` rather than at module level, because reading a spec or listing
    backends imports the module.

    Attributes:
        name: the name of the backend on the command line.
        suffixes: the suffixes of the files that the backend opens. Set it for a backend that is found through an entry
            point. Other backends are registered with their suffixes; see `cifarx_serve.backends.registry`.
        spec: the model spec in the file.
        provider: what runs the model, as the runtime reports it. It is never just the requested device.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    spec: ModelSpec
    provider: str

    @abstractmethod
    def __init__(self, path: Path, device: Device) -> None:
        """Open a model file on a device.

        Raises:
            ModelFileError: this backend cannot run the file, or the file contains no spec.
            DeviceError: the device is not available.
        """

    @classmethod
    @abstractmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without preparing the model to run.

        Raises:
            ModelFileError: this backend cannot run the file, or the file contains no spec.
        """

    @abstractmethod
    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits, float32 (N, classes), for a batch that `preprocess.model_input` returned."""

    def device_time(self, batch: NDArray[Any]) -> float | None:  # noqa: ARG002  unused where there is no such device
        """Return the time that the device takes for a batch, in microseconds, measured between two events on it.

        This is None for a device without events, such as the CPU, or if the time cannot be measured.

        Args:
            batch: as for `run`. It is copied to the device before the first event.
        """
        return None

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        """Return the inputs and then the outputs of the model, or an empty tuple if the file does not describe them."""
        return ()

    def single_threaded(self) -> "Backend":
        """Return a backend for the same model whose runs use only the calling thread. The caller must close it.

        Use it when many threads call `run` at once. It is this backend itself where that makes no difference.
        """
        return self

    @abstractmethod
    def close(self) -> None:
        """Release the model. Calling it twice is safe."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_file(path: Path) -> None:
    """Check that a file exists.

    Raises:
        ModelFileError: the path does not exist or is a directory.
    """
    if path.is_dir():
        raise ModelFileError(f"{path} is a directory", "give the path of a model file")
    if not path.exists():
        command = "train" if path.suffix == ".pth" else "export"
        raise ModelFileError(f"no such file {path}", f"check the path, or create the file with `cifarx {command}`")


def parse_spec(document: bytes | None, path: Path) -> ModelSpec:
    """Return the spec of a model file from the JSON document in it, which is None if there is none.

    Raises:
        ModelFileError: there is no document.
        SpecError: the document is malformed or has a newer schema.
    """
    if document is None:
        raise ModelFileError(f"{path} contains no model spec", "create the file with `cifarx export`")
    return ModelSpec.from_json(document, str(path))
