"""Captures a training step in a CUDA graph, so that the host launches one graph instead of every kernel."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

import torch

from cifarx_serve.errors import FallbackWarning, error_message
from cifarx_train.device_memory import free_device_memory
from cifarx_train.distributed import Distributed
from cifarx_train.recipes import Recipe

Step: TypeAlias = Callable[..., torch.Tensor]
"""A training step. Takes tensors whose first dimension is the batch and returns its metrics on the device."""

_WARMUP_STEPS: Final = 3
"""Eager steps before the capture, which create lazy buffers and select kernels. PyTorch's documentation uses three."""


def can_capture(device: torch.device, recipe: Recipe, distributed: Distributed) -> bool:
    """Return whether the training step of a run can be captured in a CUDA graph.

    With fp16, the gradient scaler asks the host whether to skip a step, except for PyTorch's fused optimizers, which
    skip it on the device.
    """
    fused = recipe.optimizer != "muon"
    return device.type == "cuda" and distributed.world_size == 1 and (recipe.precision != "fp16" or fused)


class GraphedStep:
    """A training step that replays a CUDA graph for the full batches of a run and runs eagerly for all others.

    The warm-up steps run eagerly on a side stream. They are regular training steps, so no batch is trained on twice. If
    the capture fails, all steps run eagerly and a `FallbackWarning` is issued.

    A graph keeps the memory of a step, which other batches cannot use. If too little is left for such a batch, the
    graph is released and captured again later, so that every run that fits without a graph also fits with one.

    Args:
        step: the training step.
        device: the CUDA device.
        batch_size: the number of images of a full batch. Other batches are too rare to be captured.
    """

    def __init__(self, step: Step, device: torch.device, batch_size: int) -> None:
        self._step = step
        self._batch_size = batch_size
        self._stream = torch.cuda.Stream(device)
        self._device = self._stream.device  # has an index
        self._warmup_steps_left = _WARMUP_STEPS
        self._is_capturable = True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_bytes = 0
        self._largest_eager_batch = 0
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._result = torch.empty(0)

    @property
    def captured(self) -> bool:
        """Whether full batches replay a graph."""
        return self._graph is not None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Train on a batch, and return the metrics. The next call may overwrite them."""
        if len(inputs[0]) != self._batch_size:
            self._make_room(len(inputs[0]))
            return self._step(*inputs)
        if self._warmup_steps_left > 0:
            self._warmup_steps_left -= 1
            return self._run_on_side_stream(inputs)
        if self._graph is None and self._is_capturable:
            self._capture(inputs)
        if self._graph is None:
            return self._step(*inputs)
        for static, value in zip(self._inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        self._graph.replay()
        return self._result

    def _run_on_side_stream(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._step(*inputs)
        current.wait_stream(self._stream)
        return result

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Record the graph. Recording does not run the step."""
        torch.cuda.empty_cache()
        self._inputs = tuple(value.to(self._device, copy=True) for value in inputs)
        reserved = torch.cuda.memory_reserved(self._device)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        reason = ""
        try:
            with (
                _recover_from_failure(self._device, pool),
                # Threads that stream images may allocate pinned memory during the capture.
                torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    self._result = self._step(*self._inputs)
                except Exception as error:  # the forward pass of a model may raise anything
                    reason = error_message(error)  # the end of the failed capture raises another error
                    raise
        except Exception as error:
            self._is_capturable = False
            reason = reason or error_message(error)
            warnings.warn(f"training without a CUDA graph, which is slower: {reason}", FallbackWarning, stacklevel=2)
        else:
            self._graph = graph
            self._graph_bytes = torch.cuda.memory_reserved(self._device) - reserved
            self._largest_eager_batch = 0

    def _make_room(self, batch_size: int) -> None:
        """Release the graph if an eager step needs its memory. PyTorch then reuses it when no other memory is left."""
        if self._graph is None or batch_size <= self._largest_eager_batch:
            return
        self._largest_eager_batch = batch_size
        free = free_device_memory(self._device)
        if free is not None and free < self._graph_bytes * batch_size / self._batch_size:
            self._graph.reset()
            self._graph = None


@contextmanager
def _recover_from_failure(device: torch.device, pool: tuple[int, int]) -> Iterator[None]:
    """Restore the current stream, the random generator and the memory of a device if a capture in the block fails.

    PyTorch does this itself since 2.15 at the latest. PyTorch 2.11 leaves the stream of the capture current, a default
    generator that refuses to draw outside of a capture, and the memory of the captured step allocated.
    """
    generator = torch.cuda.default_generators[device.index]
    state, stream = generator.get_state(), torch.cuda.current_stream(device)
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh)
        with suppress(RuntimeError):  # the memory has been released
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        raise
