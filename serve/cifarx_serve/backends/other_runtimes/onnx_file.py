"""The base class of backends that run an ONNX file on the CPU in a library that reads ONNX itself."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, UsageError, error_message
from cifarx_serve.spec import ModelSpec


class OnnxFileBackend(Backend):
    """An ONNX file in another library than ONNX Runtime.

    The bytes of the file are checked as for ONNX Runtime before the library reads them.

    Attributes:
        library: the library, for messages.
    """

    library: ClassVar[str]

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        if device.type not in ("auto", "cpu"):
            raise DeviceError(f"{self.library} runs on the CPU, but {device} was requested", "use --device cpu")
        self._path = path
        try:
            self.provider = self.open_library(path)
        except ModuleNotFoundError as error:
            raise UsageError(f"{self.library} is not installed", f'pip install "cifarx[{self.name}]"') from error
        except Exception as error:  # the exceptions of the libraries have no common base class
            problem = f"{self.library} cannot read {path} ({self.describe_error(error)})"
            raise ModelFileError(problem, "use another --runtime") from error

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        return OnnxRuntimeBackend.read_spec(path)

    @abstractmethod
    def open_library(self, path: Path) -> str:
        """Open a file, and return the library and its version. Errors of the library may be raised as they are."""

    @abstractmethod
    def infer(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Return the output for a batch. Errors of the library may be raised as they are."""

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        try:
            return self.infer(batch)
        except Exception as error:  # the exceptions of the libraries have no common base class
            problem = f"{self._path} cannot run on {batch.dtype} {batch.shape} ({self.describe_error(error)})"
            raise ModelFileError(problem, "use another --runtime") from error

    def describe_error(self, error: Exception) -> str:
        """Return the message of an error of the library on one line."""
        return error_message(error)
