"""What the backends that run PyTorch share: a module on a device, numpy in and numpy out."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend

if TYPE_CHECKING:
    import torch


class TorchBackend(Backend):
    """A subclass's `__init__` calls `_hold` with what it loaded. Importing this module imports no PyTorch."""

    def _hold(self, module: Any, device: "torch.device") -> None:
        import torch

        self._torch = torch
        self._module = module
        self._device = device
        self.provider = str(device)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            logits = self._module(self._torch.from_numpy(batch).to(self._device))
        array: NDArray[np.float32] = logits.cpu().numpy()
        return array

    def device_time(self, batch: NDArray[Any]) -> float | None:
        """On CUDA alone."""
        if self._device.type != "cuda":
            return None
        cuda = self._torch.cuda
        with self._torch.inference_mode(), cuda.device(self._device):
            images = self._torch.from_numpy(batch).to(self._device)
            started, ended = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            started.record()
            self._module(images)
            ended.record()
            ended.synchronize()
        return float(started.elapsed_time(ended)) * 1e3

    def close(self) -> None:
        self._module = None
