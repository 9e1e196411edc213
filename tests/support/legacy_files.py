"""`.pth` files as other programs write them, and how tests read them."""

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifarx_serve.errors import FallbackWarning
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from cifarx_train.models.registry import network

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])


def notes_class(module: str, name: str = "Lzh", attribute: str = "model", classes: int = 10) -> type[nn.Module]:
    """The network as the notes write it, in a module of that name; call it where `module` can be imported."""

    def init(self: Any) -> None:
        nn.Module.__init__(self)
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 5, 1, 2), nn.MaxPool2d(2)]
        setattr(self, attribute, nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, classes)))

    def forward(self: Any, images: torch.Tensor) -> Any:
        return getattr(self, attribute)(images)

    return type(name, (nn.Module,), {"__init__": init, "forward": forward, "__module__": module})


def whole(kind: type[nn.Module], path: Path, zipped: bool = True) -> nn.Module:
    """A new network of that class, saved with its class to be found only while saving."""
    torch.manual_seed(0)
    module, old = kind(), sys.modules.get(kind.__module__)
    sys.modules[kind.__module__] = types.ModuleType(kind.__module__)
    setattr(sys.modules[kind.__module__], kind.__name__, kind)
    try:
        save(module, path, zipped)
    finally:
        del sys.modules[kind.__module__]
        if old:
            sys.modules[kind.__module__] = old
    return module


def save(content: Any, path: Path, zipped: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the older format misses the source of a class made by a test
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def read(path: Path, model: str | None = None) -> Checkpoint:
    with pytest.warns(FallbackWarning, match="the file says nothing of its classes"):
        return load_checkpoint(path, model)


def same_answers(checkpoint: Checkpoint, module: nn.Module) -> bool:
    size = checkpoint.spec.input
    images = torch.rand(2, 3, size.height, size.width)
    with torch.no_grad():
        return torch.equal(checkpoint.build()(images), module.eval()(images))


def weights(name: str = "lzh", classes: int = 10) -> dict[str, torch.Tensor]:
    return dict(network(name).build(classes).state_dict())
