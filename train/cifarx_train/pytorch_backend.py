"""PyTorch itself: runs a checkpoint as it was trained. The reference of every proof."""

from pathlib import Path

from cifarx_serve.backends.torch_backend import TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.spec import ModelSpec


class PyTorchBackend(TorchBackend):
    """The checkpoint's network in eval mode, fp32."""

    name = "pytorch"
    suffixes = (".pth",)

    def __init__(self, path: Path, device: Device) -> None:
        from cifarx_serve.backends.torch_device import torch_device
        from cifarx_train.checkpoint import load_checkpoint

        place = torch_device(device)
        checkpoint = load_checkpoint(path)
        self.spec = checkpoint.spec
        self._hold(checkpoint.build().to(place), place)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        from cifarx_train.checkpoint import load_checkpoint

        return load_checkpoint(path).spec
