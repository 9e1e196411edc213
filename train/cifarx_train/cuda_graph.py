"""Captures a training step in a CUDA graph, so that the host launches one graph instead of every kernel."""

import warnings
from collections.abc import Callable
from typing import Final, TypeAlias

import torch

from cifarx_serve.errors import FallbackWarning, error_message

Step: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A training step. Takes images and labels on the device and returns its metrics on the device."""

_WARMUP_STEPS: Final = 3
"""Eager steps before the capture, which create lazy buffers and select kernels. PyTorch's documentation uses three."""


class GraphedStep:
    """A training step that replays a CUDA graph for batches of one shape and runs eagerly for all others.

    The warm-up steps run eagerly on a side stream. They are regular training steps, so no batch is trained on twice. If
    the capture fails, all steps run eagerly and a `FallbackWarning` is issued.

    Args:
        step: the training step.
        device: the CUDA device.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._stream = torch.cuda.Stream(device)
        self._warmup_steps_left = _WARMUP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images = self._labels = self._result = torch.empty(0)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._warmup_steps_left > 0:
            self._warmup_steps_left -= 1
            return self._run_on_side_stream(images, labels)
        if self._warmup_steps_left == 0:
            self._warmup_steps_left = -1
            self._capture(images, labels)
        if self._graph is None or images.shape != self._images.shape:
            return self._step(images, labels)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._result

    def _run_on_side_stream(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._step(images, labels)
        current.wait_stream(self._stream)
        return result

    def _capture(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Record the graph. Recording does not run the step."""
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that stream images may allocate pinned memory during the capture.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._step(self._images, self._labels)
        except RuntimeError as error:
            warnings.warn(
                f"training without a CUDA graph, which is slower: {error_message(error)}", FallbackWarning, stacklevel=2
            )
        else:
            self._graph = graph
