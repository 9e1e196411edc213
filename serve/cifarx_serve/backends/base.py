"""What every backend is: a model file opened on a device."""

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
    """A model's input or output: a name, a numpy type, and a shape in which an axis that may vary is a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Backend(ABC):
    """A model file opened on a device; a context manager.

    A subclass imports its heavy library inside `__init__`, not at the top of its module: the registry imports
    the modules to learn their suffixes.

    Attributes:
        name: the backend's name on the command line.
        suffixes: the endings of the files it can open.
        spec: what the file says about itself.
        provider: what really runs the model, as the library names it; never merely what was asked for.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    spec: ModelSpec
    provider: str

    @abstractmethod
    def __init__(self, path: Path, device: Device) -> None:
        """Open the file.

        Raises:
            ModelFileError: the file is not one this backend can run, or has no spec.
            DeviceError: the device cannot be had.
        """

    @classmethod
    @abstractmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """What the file says about itself, without the cost of making it ready to run; raises as opening does."""

    @abstractmethod
    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Logits, (N, classes), of a batch as `preprocess.model_input` makes it."""

    def device_time(self, batch: NDArray[Any]) -> float | None:  # noqa: ARG002  the device's, where there is one
        """Microseconds between two events on the device around the run of a batch that lies there already.

        None where there is no such device, as on a CPU, or where its time cannot be told.

        Args:
            batch: as `run` takes it; it is copied to the device before the first event.
        """
        return None

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        """The inputs, then the outputs, where the file states them; none where it does not."""
        return ()

    def single_threaded(self) -> "Backend":
        """The model for callers that bring a thread a CPU, so that each call keeps to its caller's; who asks closes it.

        It is this one where that makes no difference.
        """
        return self

    @abstractmethod
    def close(self) -> None:
        """Give back what the file holds open; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_file(path: Path) -> None:
    """Raises ModelFileError where `path` is not a file."""
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder", "name a model file")
    if not path.exists():
        maker = "train" if path.suffix == ".pth" else "export"
        raise ModelFileError(f"no such file {path}", f"check the path, or make it with `cifarx {maker}`")
