"""The worker program that measures one model file, in a process that shares no threads or memory with others.

It reads requests from standard input and writes replies, one line of JSON each. It exits when its input is closed.
"""

import sys
import time
import warnings
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend, require_interface, run_checked
from cifarx_serve.backends.registry import RegisteredBackend, model_file, open_backend, register_backend
from cifarx_serve.backends.torch.aot_inductor import trust_packages
from cifarx_serve.benchmarking.timing import WINDOW_S, WINDOW_WARMUP_CALLS, measure_window, warm_up
from cifarx_serve.errors import CifarxError, FallbackWarning, UsageError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.scores import applicable_labels, predicted_classes
from cifarx_serve.system.cpus import set_cpu_limit
from cifarx_serve.system.gpus import used_gpu_memory
from cifarx_serve.system.memory import peak_process_memory
from cifarx_serve.system.worker_process import init_worker

_PREDICT_BATCH: Final = 64
_DEVICE_RUNS: Final = 50


class OpenModel(msgspec.Struct, frozen=True, tag=True):
    """Request to open a model file on a device. The reply is an `OpenedModel`.

    Attributes:
        images: a `.npy` file with images, uint8 (N, height, width, channels), at the input size of the model.
        registered: the backends that the parent process has registered.
        stated: what the user states about the model, see `Backend.open_stated`.
        single_threaded: whether to run it in one thread: as for one CPU, and see `Backend.single_threaded`.
        trusted: the hashes of the AOTInductor packages that the parent process may open.
    """

    path: str
    device: str
    images: str
    registered: tuple[RegisteredBackend, ...]
    stated: dict[str, Any] = {}
    single_threaded: bool = False
    trusted: tuple[str, ...] = ()


class WarmUp(msgspec.Struct, frozen=True, tag=True):
    """Request to set the batch size of the following windows and to warm up. The reply is null."""

    batch: int


class MeasureWindow(msgspec.Struct, frozen=True, tag=True):
    """Request to measure one window. The reply is the time of each counted call in microseconds."""


class MeasureDeviceTimes(msgspec.Struct, frozen=True, tag=True):
    """Request for device times at a batch size. The reply is a list in microseconds, empty without such a device."""

    batch: int


class MeasureMemory(msgspec.Struct, frozen=True, tag=True):
    """Request for the memory that the model took so far. The reply is a `MemoryUse`."""


class Predict(msgspec.Struct, frozen=True, tag=True):
    """Request to classify all images. The reply is `Predictions`."""


Request: TypeAlias = OpenModel | WarmUp | MeasureWindow | MeasureDeviceTimes | MeasureMemory | Predict


class OpenedModel(msgspec.Struct, frozen=True):
    """What runs a model file, and how long opening it took.

    Attributes:
        multi_label: whether several labels can apply to an image.
        load_ms: the time to open the file, including the import of its library.
        first_call_ms: the time of the first call, with one image.
        size_bytes: the size of the file.
        warnings: the messages of the fallback warnings.
    """

    backend: str
    provider: str
    precision: str
    multi_label: bool
    load_ms: float
    first_call_ms: float
    size_bytes: int
    warnings: tuple[str, ...]


class Predictions(msgspec.Struct, frozen=True):
    """What a model predicts for each image.

    Attributes:
        classes: the best class.
        labels: all labels that apply, in increasing order; for a model with one label per image, the best class alone.
    """

    classes: list[int]
    labels: list[list[int]]


class MemoryUse(msgspec.Struct, frozen=True):
    """The memory of a process with a model.

    Attributes:
        peak_bytes: the peak memory of the process.
        gpu_bytes: by how much the used memory of the GPUs grew while the model was opened and warmed up; None for a
            model that used none, or if it cannot be read.
    """

    peak_bytes: int
    gpu_bytes: int | None


class Reply(msgspec.Struct, frozen=True):
    """The result of a request, or the class name and the arguments of the exception that it raised."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    arguments: tuple[str, ...] = ()


class _Model:
    """The open model file, and the images to measure it with."""

    def __init__(self, request: OpenModel) -> None:
        for registered in request.registered:
            register_backend(*registered)
        trust_packages(request.trusted)
        self._images: NDArray[np.uint8] = np.load(request.images, mmap_mode="r", allow_pickle=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", FallbackWarning)
            before = used_gpu_memory()
            if request.single_threaded:
                set_cpu_limit(1)  # PyTorch's own backends have no other way
            started = time.perf_counter()
            self._backend = open_backend(request.path, device=request.device, stated=request.stated)
            load_ms = (time.perf_counter() - started) * 1e3
            if request.single_threaded:  # which may open the file once more
                self._backend = self._backend.single_threaded()
        self._require_size(request.path)
        require_interface(self._backend, request.path)
        self._inputs = self._batch(1)
        started = time.perf_counter()
        run_checked(self._backend, self._inputs, request.path)
        first_call_ms = (time.perf_counter() - started) * 1e3
        self._gpu_bytes = _growth(before)
        self.opened = OpenedModel(
            self._backend.name,
            self._backend.provider,
            self._backend.spec.precision,
            self._backend.spec.multi_label,
            load_ms,
            first_call_ms,
            _size_bytes(model_file(Path(request.path))),
            tuple(str(warning.message) for warning in caught),
        )

    def handle(self, request: Request) -> Any:
        match request:
            case WarmUp(batch):
                self._inputs = self._batch(batch)
                before = used_gpu_memory()
                warm_up(self._run)
                self._gpu_bytes += _growth(before)
                return None
            case MeasureWindow():
                return measure_window(self._run).tolist()
            case MeasureDeviceTimes(batch):
                return measure_device_times(self._backend, self._batch(batch))
            case MeasureMemory():
                return MemoryUse(peak_process_memory(), self._gpu_bytes or None)
            case Predict():
                return predict(self._backend, self._images)
            case OpenModel():
                return self.opened

    def _run(self) -> object:
        return self._backend.run(self._inputs)

    def _batch(self, size: int) -> NDArray[Any]:
        positions = np.arange(size) % len(self._images)
        return model_input(np.array(self._images[positions]), self._backend.spec)

    def _require_size(self, path: str) -> None:
        taken, found = self._backend.spec.input, self._images.shape[1:]
        if (taken.height, taken.width, taken.channels) != found:
            size, other = _describe_size(taken.height, taken.width, taken.channels), _describe_size(*found)
            raise UsageError(
                f"{path} takes {size}, but the first file {other}", "compare models with the same input size"
            )


def _describe_size(height: int, width: int, channels: int) -> str:
    return f"{'grayscale ' if channels == 1 else ''}images of {height}x{width}"


def _size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _growth(before: int | None) -> int:
    """Return by how much the used memory of the GPUs grew. The runtimes keep what they took for the next run."""
    after = used_gpu_memory()
    return 0 if before is None or after is None else max(after - before, 0)


def predict(backend: Backend, images: NDArray[np.uint8], batch_size: int = _PREDICT_BATCH) -> Predictions:
    """Return the predictions for images, uint8 (N, height, width, channels)."""
    spec, starts = backend.spec, range(0, len(images), batch_size)
    outputs = np.concatenate(
        [run_checked(backend, model_input(images[start : start + batch_size], spec)) for start in starts]
    )
    applicable = applicable_labels(outputs, spec)
    return Predictions(predicted_classes(outputs, spec).tolist(), [np.flatnonzero(row).tolist() for row in applicable])


def measure_device_times(backend: Backend, inputs: NDArray[Any]) -> list[float]:
    """Return the device time of several runs in microseconds, without those that warm up.

    There are at most fifty runs, fewer if they take longer than a window, and at least one. The list is empty if the
    backend does not report device times.
    """
    times: list[float] = []
    end = time.perf_counter() + WINDOW_S
    while len(times) < WINDOW_WARMUP_CALLS + _DEVICE_RUNS and (
        len(times) <= WINDOW_WARMUP_CALLS or time.perf_counter() < end
    ):
        if (device_time := backend.device_time(inputs)) is None:
            return []
        times.append(device_time)
    return times[WINDOW_WARMUP_CALLS:]


def main() -> None:
    """Answer requests until standard input is closed."""
    replies = init_worker()
    model: _Model | None = None
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        try:
            if isinstance(request, OpenModel):
                model = _Model(request)
            assert model is not None, "the first request opens a file"
            reply = Reply(msgspec.Raw(msgspec.json.encode(model.handle(request))))
        except CifarxError as error:
            reply = Reply(error=type(error).__name__, arguments=(error.problem, error.remedy))
        except ModuleNotFoundError as error:
            reply = Reply(error="ModuleNotFoundError", arguments=(error.name or "", str(error)))
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
