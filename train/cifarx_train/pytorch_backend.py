"""PyTorch itself: runs a checkpoint as it was trained. The reference of every proof."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from cifarx_train.checkpoints.checkpoint import Checkpoint


class PyTorchBackend(TorchBackend):
    """The checkpoint's network in eval mode, fp32."""

    name = "pytorch"
    suffixes = (".pth",)

    def __init__(self, path: Path, device: Device, model: str | None = None) -> None:
        """As every backend's; `model` names the network of a file that does not say it itself."""
        from cifarx_serve.backends.torch.device import torch_device
        from cifarx_train.checkpoints.checkpoint import load_checkpoint

        place = torch_device(device)
        self._open(load_checkpoint(path, model), place)

    @classmethod
    def of(cls, checkpoint: "Checkpoint", device: Device) -> Self:
        """Of a checkpoint that is in memory; raises as opening a file does."""
        from cifarx_serve.backends.torch.device import torch_device

        backend = cls.__new__(cls)
        backend._open(checkpoint, torch_device(device))
        return backend

    def _open(self, checkpoint: "Checkpoint", place: "torch.device") -> None:
        self.spec = checkpoint.spec
        self._hold(checkpoint.build().to(place), place)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        from cifarx_train.checkpoints.checkpoint import load_checkpoint

        return load_checkpoint(path).spec
