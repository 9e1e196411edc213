"""The program that measures one model file: a process of its own shares no threads and no memory with another.

It reads a request a line, as JSON, from standard input, and writes a reply a line; the end of the requests ends it.
"""

import sys
import time
import warnings
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import RegisteredBackend, model_file, open_backend, register_backend
from cifarx_serve.benchmarking.timing import WARMUP_CALLS, WINDOW_S, measure_window, warm_up
from cifarx_serve.errors import CifarxError, FallbackWarning, UsageError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.system.peak_memory import peak_memory
from cifarx_serve.system.worker_process import take_replies

_PART: Final = 64
"""Images that are classified together."""

_DEVICE_RUNS: Final = 50


class Open(msgspec.Struct, frozen=True, tag=True):
    """Open a model file on a device; `images` are uint8 (N, height, width, 3) in a `.npy` file. Gives an `Opened`."""

    path: str
    device: str
    images: str
    registered: tuple[RegisteredBackend, ...]


class WarmUp(msgspec.Struct, frozen=True, tag=True):
    """Make ready for windows of this batch size. Gives nothing."""

    batch: int


class Window(msgspec.Struct, frozen=True, tag=True):
    """Measure one window. Gives the microseconds of each counted call."""


class DeviceTimes(msgspec.Struct, frozen=True, tag=True):
    """Gives the microseconds on the device of each of some runs of this batch size; none where it tells none."""

    batch: int


class Peak(msgspec.Struct, frozen=True, tag=True):
    """Gives the most bytes of memory that the process has held."""


class Classify(msgspec.Struct, frozen=True, tag=True):
    """Gives the argmax of every image."""


Request: TypeAlias = Open | WarmUp | Window | DeviceTimes | Peak | Classify


class Opened(msgspec.Struct, frozen=True):
    """What runs a file, and what it took.

    Attributes:
        load_ms: to open it, the import of its library among it.
        first_call_ms: of the first call, with one image.
        size_bytes: of the file.
        told: warnings.
    """

    backend: str
    provider: str
    precision: str
    load_ms: float
    first_call_ms: float
    size_bytes: int
    told: tuple[str, ...]


class Reply(msgspec.Struct, frozen=True):
    """What a request gives, or an error: the name of its class, and what it was made with."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    arguments: tuple[str, ...] = ()


class _Measured:
    """The file, opened."""

    def __init__(self, request: Open) -> None:
        for registered in request.registered:
            register_backend(*registered)
        self._images: NDArray[np.uint8] = np.load(request.images, mmap_mode="r", allow_pickle=False)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", FallbackWarning)
            started = time.perf_counter()
            self._backend = open_backend(request.path, device=request.device)
            load_ms = (time.perf_counter() - started) * 1e3
        self._require_size(request.path)
        self._inputs = self._batch(1)
        started = time.perf_counter()
        self._backend.run(self._inputs)
        first_call_ms = (time.perf_counter() - started) * 1e3
        self.opened = Opened(
            self._backend.name,
            self._backend.provider,
            self._backend.spec.precision,
            load_ms,
            first_call_ms,
            model_file(Path(request.path)).stat().st_size,
            tuple(str(warning.message) for warning in told),
        )

    def answer(self, request: Request) -> Any:
        match request:
            case WarmUp(batch):
                self._inputs = self._batch(batch)
                warm_up(self._run)
                return None
            case Window():
                return measure_window(self._run).tolist()
            case DeviceTimes(batch):
                return device_times(self._backend, self._batch(batch))
            case Peak():
                return peak_memory()
            case Classify():
                return predicted_labels(self._backend, self._images).tolist()
            case Open():
                return self.opened

    def _run(self) -> object:
        return self._backend.run(self._inputs)

    def _batch(self, count: int) -> NDArray[Any]:
        return model_input(np.array(self._images[:count]), self._backend.spec)

    def _require_size(self, path: str) -> None:
        taken, given = self._backend.spec.input, self._images.shape[1:3]
        if (taken.height, taken.width) != given:
            raise UsageError(
                f"{path} takes images of {taken.height}x{taken.width}, the first file {given[0]}x{given[1]}",
                "compare models of one input size",
            )


def predicted_labels(backend: Backend, images: NDArray[np.uint8], batch: int = _PART) -> NDArray[np.int64]:
    """The argmax of each image, (N,)."""
    parts = (model_input(images[start : start + batch], backend.spec) for start in range(0, len(images), batch))
    return np.concatenate([backend.run(part).argmax(1) for part in parts])


def device_times(backend: Backend, inputs: NDArray[Any]) -> list[float]:
    """Microseconds on the device of up to fifty runs, or of as many as a window's time allows, at least one.

    None of it where the backend tells no such time.
    """
    times: list[float] = []
    end = time.perf_counter() + WINDOW_S
    while len(times) < WARMUP_CALLS + _DEVICE_RUNS and (len(times) <= WARMUP_CALLS or time.perf_counter() < end):
        if (found := backend.device_time(inputs)) is None:
            return []
        times.append(found)
    return times[WARMUP_CALLS:]


def main() -> None:
    """Answer requests until there are no more."""
    replies = take_replies()
    measured: _Measured | None = None
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        try:
            if isinstance(request, Open):
                measured = _Measured(request)
            assert measured is not None, "the first request opens a file"
            reply = Reply(msgspec.Raw(msgspec.json.encode(measured.answer(request))))
        except CifarxError as error:
            reply = Reply(error=type(error).__name__, arguments=(error.problem, error.remedy))
        except ModuleNotFoundError as error:
            reply = Reply(error="ModuleNotFoundError", arguments=(error.name or "", str(error)))
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
