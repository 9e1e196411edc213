"""The base class of the backends that run PyTorch: a module on a device, with numpy arrays in and out."""

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend

if TYPE_CHECKING:
    import torch

SPEC_FILE: Final = "cifarx_spec.json"
"""The name of the model spec among the extra files of a PyTorch archive."""


class TorchBackend(Backend):
    """A backend that runs a PyTorch module.

    The `__init__` of a subclass calls `_init_module` with the module that it loaded. Importing this class does not
    import PyTorch.
    """

    def _init_module(self, module: Any, device: "torch.device") -> None:
        import torch

        from cifarx_serve.backends.torch.out_of_memory import report_out_of_memory

        self._torch = torch
        self._report_out_of_memory = partial(report_out_of_memory, device)
        self._module = module
        self._device = device
        self.provider = str(device)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        with self._torch.inference_mode(), self._report_out_of_memory(len(batch)):
            outputs = self._module(self._torch.from_numpy(batch).to(self._device))
        array: NDArray[np.float32] = outputs.cpu().numpy()
        return array

    def device_time(self, batch: NDArray[Any]) -> float | None:
        """Return the time of a run in microseconds, on CUDA only."""
        if self._device.type != "cuda":
            return None
        cuda = self._torch.cuda
        with self._torch.inference_mode(), cuda.device(self._device), self._report_out_of_memory(len(batch)):
            images = self._torch.from_numpy(batch).to(self._device)
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            self._module(images)
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def close(self) -> None:
        self._module = None
