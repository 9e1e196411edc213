"""Run an ONNX Runtime session with IO binding: its input and output stay in device memory at fixed addresses.

A run then copies the input to the device, runs the model and copies the output back, and allocates only the result. The
kernels of each batch size can also be captured as a CUDA graph. Replaying it avoids the kernel launches, which take
longer than the work itself for small batches.
"""

import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import ModelSpec

if TYPE_CHECKING:
    from cifarx_serve.backends.onnxruntime.cuda_timer import CudaTimer

_GRAPH_ID: Final = "gpu_graph_id"
"""ONNX Runtime's run option for the ID of the CUDA graph that a run captures or replays."""

_NO_GRAPH: Final = "-1"
"""The ID for a run that neither captures nor replays a graph."""

_NO_SYNCHRONIZATION: Final = "disable_synchronize_execution_providers"
"""ONNX Runtime's run option to return when the work is enqueued on the stream, without waiting until it is done."""


class BoundSession:
    """A session with IO binding. Batches are padded to the next power of two. Threads run one at a time.

    Args:
        session: an `onnxruntime.InferenceSession` of a file without embedded preprocessing, created with
            `enable_cuda_graph` on a GPU.
        device: "cuda", or "cpu", where no graphs are captured.
        index: the index of the device.
        spec: the model spec in the file: the shape of an image, and the name and the size of the output.

    Attributes:
        max_batch_size: the largest batch for `run`. The launches and allocations of larger batches cost little in
            comparison, so these are left to the session.
    """

    max_batch_size: Final = 64

    def __init__(self, session: Any, device: str, index: int, spec: ModelSpec) -> None:
        self._session = session
        self._device = (device, index)
        self._spec = spec
        self._bindings: dict[int, _BatchBinding] = {}
        self._lock = threading.Lock()

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the output, float32 (N, output_size), of a batch, float32 (N, *shape), N <= `max_batch_size`."""
        with self._lock:
            return self._binding_for(len(batch)).run(batch)

    def device_time(self, batch: NDArray[np.float32], timer: "CudaTimer") -> float:
        """Return the time on the device, in microseconds, of a run whose input is already there.

        Args:
            batch: float32 (N, *shape) of any N. Above `max_batch_size` no graph is used.
            timer: the timer of the stream that the session runs on.
        """
        with self._lock:
            return self._binding_for(len(batch)).device_time(batch, timer)

    def with_session(self, session: Any) -> "BoundSession":
        """Return a bound session for another session on the same file."""
        return BoundSession(session, *self._device, self._spec)

    def _binding_for(self, count: int) -> "_BatchBinding":
        size = 1 << (count - 1).bit_length() if count <= self.max_batch_size else count
        if size not in self._bindings:
            graph_id = str(size) if count <= self.max_batch_size else _NO_GRAPH
            self._bindings[size] = _BatchBinding(self._session, self._device, self._spec, size, graph_id)
        return self._bindings[size]

    def find_mismatch(self) -> str | None:
        """Compare `run` with plain runs of the session. Return what differs, or None.

        The first run captures the graph. The second one replays it with another input.
        """
        random = np.random.default_rng(0)
        for _ in range(2):
            batch = random.random((2, *self._spec.input.shape), np.float32)
            expected = self._session.run([self._spec.output], {"input": batch}, run_options())[0]
            found = self.run(batch)
            if not np.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True):
                return f"max |Δ| {np.abs(found - expected).max():.1e} between a replayed run and a plain one"
        return None


class _BatchBinding:
    """The memory of one batch size and its IO binding."""

    def __init__(
        self,
        session: Any,
        device: tuple[str, int],
        spec: ModelSpec,
        batch_size: int,
        graph_id: str,
    ) -> None:
        import onnxruntime

        input_shape, output_shape = (batch_size, *spec.input.shape), (batch_size, spec.output_size)
        self._session = session
        self._host = np.zeros(input_shape, np.float32)
        self._input = onnxruntime.OrtValue.ortvalue_from_shape_and_type(input_shape, np.float32, *device)
        self._output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output_shape, np.float32, *device)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("input", self._input)
        self._binding.bind_ortvalue_output(spec.output, self._output)
        self._options = run_options(graph_id)
        self._graph_id = graph_id

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch of this size or less. The remaining rows hold earlier images, which affect no other row."""
        self._host[: len(batch)] = batch
        self._input.update_inplace(self._host)
        self._session.run_with_iobinding(self._binding, self._options)
        outputs: NDArray[np.float32] = self._output.numpy()[: len(batch)].copy()
        return outputs

    def device_time(self, batch: NDArray[np.float32], timer: "CudaTimer") -> float:
        """Return the time of a run in microseconds, after a first run that copies the input and captures the graph."""
        self.run(batch)
        options = run_options(self._graph_id)
        options.add_run_config_entry(_NO_SYNCHRONIZATION, "1")
        return timer.time(lambda: self._session.run_with_iobinding(self._binding, options))


class TimedSession:
    """A session that runs on the stream of a timer, so that its time on the device can be measured.

    ONNX Runtime captures and replays CUDA graphs on a given stream as it does on its own.
    """

    def __init__(self, bound: BoundSession, timer: "CudaTimer") -> None:
        self._bound: BoundSession | None = bound
        self._timer = timer

    def device_time(self, batch: NDArray[np.float32]) -> float | None:
        """Return the time in microseconds, as `BoundSession.device_time` does, or None after `close`."""
        return self._bound.device_time(batch, self._timer) if self._bound else None

    def close(self) -> None:
        """Release the session, then its stream."""
        self._bound = None
        self._timer.close()


def run_options(graph_id: str = _NO_GRAPH) -> Any:
    """Return the `onnxruntime.RunOptions` for a run that captures or replays a CUDA graph, by default for one without.

    A session that was created with `enable_cuda_graph` needs them in every run.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, graph_id)
    return options
