"""The base class of all backends."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, ModelFileError, error_message
from cifarx_serve.files.regular_file import NOT_REGULAR
from cifarx_serve.spec import ModelSpec

NOTHING_STATED: Final[Mapping[str, Any]] = MappingProxyType({})


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
    def open_stated(cls, path: Path, device: Device, stated: Mapping[str, Any]) -> Self:  # noqa: ARG003  see below
        """Open a model file with what the user states about its model, for files that do not say it themselves.

        By default this is ignored, because an artifact contains its own spec.

        Args:
            path: the file.
            device: the device to run on.
            stated: plain data that the backend understands, such as a document of `ModelOptions` for a checkpoint.
        """
        return cls(path, device)

    @classmethod
    @abstractmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without preparing the model to run.

        Raises:
            ModelFileError: this backend cannot run the file, or the file contains no spec.
        """

    @abstractmethod
    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Run a batch that `preprocess.model_input` returned.

        Returns:
            Logits or probabilities as the spec says, float32 (N, spec.output_size).
        """

    def device_time(self, batch: NDArray[Any]) -> float | None:  # noqa: ARG002  unused where there is no such device
        """Return the time that the device takes for a batch, in microseconds, measured between two events on it.

        This is None for a device without events, such as the CPU, or if the time cannot be measured.

        Args:
            batch: as for `run`. It is copied to the device before the first event.
        """
        return None

    @property
    def runs_on_own_cpus(self) -> bool:
        """Whether it is known to run on the CPUs of this process, where a run takes about as long as the one before."""
        return False

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
        ModelFileError: the path does not exist, or is a directory or something else than a regular file.
    """
    if path.is_dir():
        raise ModelFileError(f"{path} is a directory", "give the path of a model file")
    if not path.exists():
        command = "train" if path.suffix == ".pth" else "export"
        raise ModelFileError(f"no such file {path}", f"check the path, or create the file with `cifarx {command}`")
    if not path.is_file():  # a pipe would be waited for, and a device may never end
        raise ModelFileError(f"{path} is {NOT_REGULAR}", "give the path of a model file")


def require_interface(backend: Backend, name: str) -> None:
    """Check that the tensors of a model are those that its spec describes, if the file describes them.

    Args:
        backend: the open model.
        name: the file, for error messages.

    Raises:
        ModelFileError: a name, dtype or shape differs. An axis of variable size differs from none.
    """
    found = backend.tensor_infos()
    if not found:
        return
    expected = _expected_tensors(backend.spec)
    if len(found) != len(expected) or not all(map(_matches, found, expected)):
        raise ModelFileError(
            f"{name} has {_describe(found)}, but its spec describes {_describe(expected)}", "export it again"
        )


def _expected_tensors(spec: ModelSpec) -> tuple[TensorInfo, TensorInfo]:
    pixels = ("batch", "height", "width", spec.input.channels)
    image = TensorInfo("input", "float32", ("batch", *spec.input.shape))
    return (
        TensorInfo("input", "uint8", pixels) if spec.embedded_preprocessing else image,
        TensorInfo(spec.output, "float32", ("batch", spec.output_size)),
    )


def _matches(found: TensorInfo, expected: TensorInfo) -> bool:
    return (
        found[:2] == expected[:2]
        and len(found.shape) == len(expected.shape)
        and all(
            size == wanted for size, wanted in zip(found.shape, expected.shape, strict=True) if _are_fixed(size, wanted)
        )
    )


def _are_fixed(*sizes: object) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _describe(tensors: tuple[TensorInfo, ...]) -> str:
    return " and ".join(f"{info.name} {info.dtype} ({', '.join(map(str, info.shape))})" for info in tensors)


def run_checked(backend: Backend, batch: NDArray[Any], name: str = "the model") -> NDArray[np.float32]:
    """Run a batch, and check that the output has the shape that the spec describes.

    Args:
        backend: the open model.
        batch: as for `Backend.run`.
        name: the file, for error messages.

    Raises:
        ModelFileError: the model cannot run on the batch, or its output has another shape.
    """
    spec = backend.spec
    try:
        outputs = backend.run(batch)
    except CifarxError:
        raise
    except Exception as error:  # the exceptions of the runtimes have no common base class
        problem = f"{name} cannot run on {batch.dtype} {batch.shape} ({error_message(error)})"
        raise ModelFileError(problem, "export it again") from error
    expected = (len(batch), spec.output_size)
    if outputs.shape != expected:
        problem = f"{name} returns {spec.output} of shape {outputs.shape} for a batch of {len(batch)}, not {expected}"
        raise ModelFileError(problem, "export it again")
    return outputs


def parse_spec(document: bytes | None, path: Path) -> ModelSpec:
    """Return the spec of a model file from the JSON document in it, which is None if there is none.

    Raises:
        ModelFileError: there is no document.
        SpecError: the document is malformed or has a newer schema.
    """
    if document is None:
        raise ModelFileError(
            f"{path} contains no model spec",
            "adopt an ONNX or TorchScript file with `cifarx adopt`, or create one with `cifarx export`",
        )
    return ModelSpec.from_json(document, str(path))
