"""A process that measures one model file, from the side that asks."""

import warnings
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve import errors
from cifarx_serve.backends.registry import registered_backends
from cifarx_serve.benchmarking.worker import Classify, DeviceTimes, Open, Opened, Peak, Reply, Request, WarmUp, Window
from cifarx_serve.errors import FallbackWarning, ModelFileError
from cifarx_serve.system.worker_process import ChildEnded, ChildProgram

_PROGRAM: Final = "cifarx_serve.benchmarking.worker"

_Value = TypeVar("_Value")


class BenchmarkProcess:
    """A model file opened in a process of its own, until it is closed.

    Args:
        path: the model file.
        device: auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N or mps.
        images: uint8 (N, height, width, 3) at the model's input size, in a `.npy` file.

    Raises:
        UsageError, ModelFileError, DeviceError: as opening a backend does. ModelFileError also from every method,
            where the process has died.
    """

    def __init__(self, path: Path, device: str, images: Path) -> None:
        self.path = path
        self._process = ChildProgram(_PROGRAM)
        try:
            self.opened = self._ask(Open(str(path), device, str(images), registered_backends()), Opened)
        except BaseException:
            self.close()
            raise
        for warning in self.opened.told:
            warnings.warn(warning, FallbackWarning, stacklevel=2)

    def warm_up(self, batch: int) -> None:
        """Make ready for windows of this batch size."""
        self._ask(WarmUp(batch), type(None))

    def window(self) -> NDArray[np.float64]:
        """Microseconds of each counted call of one window."""
        return np.array(self._ask(Window(), list[float]), np.float64)

    def device_times(self, batch: int) -> NDArray[np.float64]:
        """Microseconds that each of some runs takes on the device; none where there is no such device."""
        return np.array(self._ask(DeviceTimes(batch), list[float]), np.float64)

    def peak(self) -> int:
        """The most bytes of memory that the process has held."""
        return self._ask(Peak(), int)

    def classify(self) -> NDArray[np.int64]:
        """The argmax of every image, (N,)."""
        return np.array(self._ask(Classify(), list[int]), np.int64)

    def close(self) -> None:
        """End the process; a second call does nothing."""
        self._process.close()

    def _ask(self, request: Request, kind: type[_Value]) -> _Value:
        self._process.send(msgspec.json.encode(request))
        try:
            reply = msgspec.json.decode(self._process.read_line(), type=Reply)
        except ChildEnded as error:
            problem = f"the process that ran {self.path} ended with {error.status}"
            raise ModelFileError(problem, "is there enough memory?") from error
        if reply.error:
            raise _error(reply)
        return msgspec.json.decode(reply.value, type=kind)


def _error(reply: Reply) -> Exception:
    if reply.error == "ModuleNotFoundError":
        name, message = reply.arguments
        return ModuleNotFoundError(message, name=name)
    made: Any = getattr(errors, reply.error)
    error: Exception = made(*reply.arguments)
    return error
