"""An ONNX Runtime session whose input and output stay in a device's memory, at addresses made once.

A call then copies in, runs and copies out, and allocates nothing but the result; and the kernels of a batch size can
be recorded as a CUDA graph, which replays them without the launches: those cost more than the work at small batches.
"""

import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cifarx_serve.backends.onnxruntime.cuda_timer import CudaClock

_GRAPH: Final = "gpu_graph_id"
"""ONNX Runtime's run option: the number of the CUDA graph that a run records or replays."""

_NO_GRAPH: Final = "-1"

_NO_WAITING: Final = "disable_synchronize_execution_providers"
"""ONNX Runtime's run option: the run ends when its work is on the stream, and not when it is done."""


class BoundSession:
    """Runs batches of up to `largest` at the next power of two, one call at a time whatever threads call.

    Args:
        session: an `onnxruntime.InferenceSession` from `input` to `logits`, made with `enable_cuda_graph` on a GPU.
        device: "cuda", or "cpu", where nothing is recorded.
        number: of the device.
        shape: of one image as the input takes it, (3, height, width).
        classes: logits of one image.

    Attributes:
        largest: a larger batch is worth its launches and allocations, and is left to the session.
    """

    largest: Final = 64

    def __init__(self, session: Any, device: str, number: int, shape: tuple[int, int, int], classes: int) -> None:
        self._session = session
        self._place = (device, number)
        self._shape = shape
        self._classes = classes
        self._sizes: dict[int, _Bound] = {}
        self._lock = threading.Lock()

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits, float32 (N, classes), of float32 (N, 3, height, width), N up to `largest`."""
        with self._lock:
            return self._fitting(len(batch)).run(batch)

    def device_time(self, batch: NDArray[np.float32], clock: "CudaClock") -> float:
        """Microseconds on the device of a run that finds its input there; of any N, above `largest` without a graph.

        Args:
            batch: float32 (N, 3, height, width).
            clock: of the stream that the session works on.
        """
        with self._lock:
            return self._fitting(len(batch)).device_time(batch, clock)

    def on(self, session: Any) -> "BoundSession":
        """The same for another session on the same file."""
        return BoundSession(session, *self._place, self._shape, self._classes)

    def _fitting(self, count: int) -> "_Bound":
        size = 1 << (count - 1).bit_length() if count <= self.largest else count
        if size not in self._sizes:
            graph = str(size) if count <= self.largest else _NO_GRAPH
            taken, given = (size, *self._shape), (size, self._classes)
            self._sizes[size] = _Bound(self._session, self._place, taken, given, graph)
        return self._sizes[size]

    def problem(self) -> str | None:
        """What is wrong with its answers, found by asking the session itself too; None where they are the same.

        The first run records, the second replays what was recorded, with another input.
        """
        random = np.random.default_rng(0)
        for _ in range(2):
            batch = random.random((2, *self._shape), np.float32)
            expected = self._session.run(["logits"], {"input": batch}, without_graph())[0]
            found = self.run(batch)
            if not np.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True):
                return f"max |Δ| {np.abs(found - expected).max():.1e} between a replayed run and a plain one"
        return None


class _Bound:
    """One batch size: its memory, and what binds it."""

    def __init__(
        self, session: Any, place: tuple[str, int], taken: tuple[int, ...], given: tuple[int, ...], graph: str
    ) -> None:
        import onnxruntime

        self._session = session
        self._host = np.zeros(taken, np.float32)
        self._input = onnxruntime.OrtValue.ortvalue_from_shape_and_type(taken, np.float32, *place)
        self._output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(given, np.float32, *place)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("input", self._input)
        self._binding.bind_ortvalue_output("logits", self._output)
        self._options = _run_options(graph)
        self._graph = graph

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of at most as many images; rows that are left over hold earlier ones, which change no other row."""
        self._host[: len(batch)] = batch
        self._input.update_inplace(self._host)
        self._session.run_with_iobinding(self._binding, self._options)
        logits: NDArray[np.float32] = self._output.numpy()[: len(batch)].copy()
        return logits

    def device_time(self, batch: NDArray[np.float32], clock: "CudaClock") -> float:
        """In microseconds; a whole run comes first, which copies the input in and records what is not recorded yet."""
        self.run(batch)
        options = _run_options(self._graph)
        options.add_run_config_entry(_NO_WAITING, "1")
        return clock.time(lambda: self._session.run_with_iobinding(self._binding, options))


class TimedSession:
    """A session that works on a stream of ours, so that its time on the device can be told.

    ONNX Runtime records and replays CUDA graphs on a stream that it is given as it does on its own.
    """

    def __init__(self, bound: BoundSession, clock: "CudaClock") -> None:
        self._bound: BoundSession | None = bound
        self._clock = clock

    def device_time(self, batch: NDArray[np.float32]) -> float | None:
        """Microseconds between two events around the run, see `BoundSession.device_time`; None after closing."""
        return self._bound.device_time(batch, self._clock) if self._bound else None

    def close(self) -> None:
        """End the session, then its stream."""
        self._bound = None
        self._clock.close()


def without_graph() -> Any:
    """Run options for a session that records: this run is left out of it."""
    return _run_options(_NO_GRAPH)


def _run_options(graph: str) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(_GRAPH, graph)
    return options
