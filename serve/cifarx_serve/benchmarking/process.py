"""Runs `benchmarking.worker` in a process and sends it requests."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve import errors
from cifarx_serve.backends.base import NOTHING_STATED
from cifarx_serve.backends.registry import registered_backends
from cifarx_serve.backends.torch.aot_inductor import trusted_packages
from cifarx_serve.benchmarking.worker import (
    MeasureDeviceTimes,
    MeasureMemory,
    MeasureWindow,
    MemoryUse,
    OpenedModel,
    OpenModel,
    Predict,
    Predictions,
    Reply,
    Request,
    WarmUp,
)
from cifarx_serve.errors import FallbackWarning, ModelFileError
from cifarx_serve.system.worker_process import WorkerExited, start_module

_PROGRAM: Final = "cifarx_serve.benchmarking.worker"

_Value = TypeVar("_Value")


class BenchmarkProcess:
    """A model file that is open in a process of its own.

    Every method that sends a request raises a `ModelFileError` if the process has ended.

    Args:
        path: the model file.
        device: auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N, mps, gpu or npu.
        images_file: a `.npy` file with images, uint8 (N, height, width, channels), at the input size of the model.
        stated: what the user states about the model, see `Backend.open_stated`.
        single_threaded: whether to run it in one thread, see `Backend.single_threaded`.

    Attributes:
        opened: what runs the file, and how long opening it took.

    Raises:
        UsageError: the device is unknown, or the images have another size.
        ModelFileError: the file does not exist or cannot be run.
        DeviceError: the device is not available.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        images_file: Path,
        stated: Mapping[str, Any] = NOTHING_STATED,
        *,
        single_threaded: bool = False,
    ) -> None:
        self.path = path
        self._process = start_module(_PROGRAM)
        try:
            request = OpenModel(
                str(path),
                device,
                str(images_file),
                registered_backends(),
                dict(stated),
                single_threaded,
                trusted_packages(),
            )
            self.opened = self._request(request, OpenedModel)
        except BaseException:
            self.close()
            raise
        for warning in self.opened.warnings:
            warnings.warn(warning, FallbackWarning, stacklevel=2)

    def warm_up(self, batch: int) -> None:
        """Set the batch size of the following windows, and warm up."""
        self._request(WarmUp(batch), type(None))

    def measure_window(self) -> NDArray[np.float64]:
        """Measure one window and return the time of each counted call in microseconds."""
        return np.array(self._request(MeasureWindow(), list[float]), np.float64)

    def device_times(self, batch: int) -> NDArray[np.float64]:
        """Return the device times of several runs in microseconds; empty for a device that does not report them."""
        return np.array(self._request(MeasureDeviceTimes(batch), list[float]), np.float64)

    def memory_use(self) -> MemoryUse:
        """Return the memory that the process and its model took so far."""
        return self._request(MeasureMemory(), MemoryUse)

    def predict(self) -> Predictions:
        """Return what the model predicts for every image."""
        return self._request(Predict(), Predictions)

    def close(self) -> None:
        """End the process. Calling it twice is safe."""
        self._process.close()

    def _request(self, request: Request, result_type: type[_Value]) -> _Value:
        self._process.send(msgspec.json.encode(request))
        try:
            reply = msgspec.json.decode(self._process.readline(), type=Reply)
        except WorkerExited as error:
            problem = f"the process that runs {self.path} ended with status {error.status}"
            raise ModelFileError(problem, "check whether there is enough memory") from error
        if reply.error:
            raise _to_exception(reply)
        return msgspec.json.decode(reply.value, type=result_type)


def _to_exception(reply: Reply) -> Exception:
    """Return the exception that the worker raised."""
    if reply.error == "ModuleNotFoundError":
        name, message = reply.arguments
        return ModuleNotFoundError(message, name=name)
    error_type: Any = getattr(errors, reply.error)
    error: Exception = error_type(*reply.arguments)
    return error
