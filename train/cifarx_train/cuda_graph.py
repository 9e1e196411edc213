"""A training step as one CUDA graph: the host launches it once, where it would launch every kernel."""

import warnings
from collections.abc import Callable
from typing import Final, TypeAlias

import torch

from cifarx_serve.errors import FallbackWarning

Step: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes images and labels on the device, trains on them, gives what is to be read of it, on the device."""

_EAGER_STEPS: Final = 3
"""Before the capture: lazily made buffers and chosen kernels must be there; PyTorch's documentation says three."""


class GraphedStep:
    """A step that replays itself for batches of one shape, and runs as it is for the others.

    The first steps run eagerly, on a side stream, and count like any other: nothing is trained twice. Where the capture
    fails the steps stay eager, told once.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._stream = torch.cuda.Stream(device)
        self._left = _EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images = self._labels = self._result = torch.empty(0)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._left > 0:
            self._left -= 1
            return self._aside(images, labels)
        if self._left == 0:
            self._left = -1
            self._capture(images, labels)
        if self._graph is None or images.shape != self._images.shape:
            return self._step(images, labels)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._result

    def _aside(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._step(images, labels)
        current.wait_stream(self._stream)
        return result

    def _capture(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Record the step; recording runs nothing."""
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that stream images may allocate pinned memory meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._step(self._images, self._labels)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"training without a CUDA graph, which is slower: {reason}", FallbackWarning, stacklevel=2)
        else:
            self._graph = graph
