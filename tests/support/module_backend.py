"""A backend that runs a PyTorch module in memory."""

from pathlib import Path

import torch
from torch import nn

from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.spec import ModelSpec


class ModuleBackend(TorchBackend):
    """Runs a module on the CPU, with any spec."""

    name = "module"

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        self.spec = spec
        self._init_module(module.eval(), torch.device("cpu"))

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        raise NotImplementedError
