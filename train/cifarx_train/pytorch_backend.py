"""The backend that runs a checkpoint in PyTorch. It is the reference of every parity check."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from cifarx_train.checkpoints.checkpoint import Checkpoint
    from cifarx_train.models.options import ModelOptions


class PyTorchBackend(TorchBackend):
    """Runs the model of a checkpoint in eval mode, in fp32.

    Args:
        path: the checkpoint, or a directory that Hugging Face's `save_pretrained` wrote.
        device: the device to run on.
        options: what the user states about the model.
    """

    name = "pytorch"

    def __init__(self, path: Path, device: Device, options: "ModelOptions | None" = None) -> None:
        from cifarx_serve.backends.torch.device import torch_device
        from cifarx_train.checkpoints.source_weights import load_model
        from cifarx_train.models.options import NO_OPTIONS

        target = torch_device(device)  # fails early: loading a checkpoint takes longer
        self._open(load_model(path, options or NO_OPTIONS), target)

    @classmethod
    def open_stated(cls, path: Path, device: Device, stated: Mapping[str, Any]) -> Self:
        from cifarx_train.models.options import ModelOptions

        return cls(path, device, ModelOptions.from_document(stated))

    @classmethod
    def from_checkpoint(cls, checkpoint: "Checkpoint", device: Device) -> Self:
        """Open a checkpoint that is already in memory. Raises the same errors as opening a file."""
        from cifarx_serve.backends.torch.device import torch_device

        backend = cls.__new__(cls)
        backend._open(checkpoint, torch_device(device))
        return backend

    def _open(self, checkpoint: "Checkpoint", device: "torch.device") -> None:
        from cifarx_serve.backends.torch.out_of_memory import report_out_of_memory

        self.spec = checkpoint.spec
        with report_out_of_memory(device):
            module = checkpoint.build().to(device)
        self._init_module(module, device)

    @property
    def network(self) -> "torch.nn.Module":
        """The module, on the device and in eval mode."""
        module: torch.nn.Module = self._module
        return module

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        from cifarx_train.checkpoints.source_weights import load_model

        return load_model(path).spec
