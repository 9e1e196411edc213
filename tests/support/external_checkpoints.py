"""External checkpoints for tests: files as other programs write them."""

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
from cifarx_train.models.options import NO_OPTIONS, ModelOptions
from cifarx_train.models.registry import get_architecture

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])


def lzh_class(module: str, name: str = "Lzh", attribute: str = "model", classes: int = 10) -> type[nn.Module]:
    """Return the Lzh class of the training notes, as if a module named `module` defined it.

    Args:
        module: the name of the module.
        name: the name of the class.
        attribute: the attribute that contains the layers.
        classes: the number of classes.
    """

    def init(self: Any) -> None:
        nn.Module.__init__(self)
        layers: list[nn.Module] = []
        for in_channels, out_channels in ((3, 32), (32, 32), (32, 64)):
            layers += [nn.Conv2d(in_channels, out_channels, 5, 1, 2), nn.MaxPool2d(2)]
        setattr(self, attribute, nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, classes)))

    def forward(self: Any, images: torch.Tensor) -> Any:
        return getattr(self, attribute)(images)

    return type(name, (nn.Module,), {"__init__": init, "forward": forward, "__module__": module})


def save_whole_model(kind: type[nn.Module], path: Path, zipped: bool = True) -> nn.Module:
    """Save a new model of a class and return it. The class can be imported only while it is saved."""
    torch.manual_seed(0)
    module, previous = kind(), sys.modules.get(kind.__module__)
    sys.modules[kind.__module__] = types.ModuleType(kind.__module__)
    setattr(sys.modules[kind.__module__], kind.__name__, kind)
    try:
        save(module, path, zipped)
    finally:
        del sys.modules[kind.__module__]
        if previous:
            sys.modules[kind.__module__] = previous
    return module


def save(content: Any, path: Path, zipped: bool = True) -> Path:
    """Save anything with `torch.save`, in the zip format or in the format before PyTorch 1.6, and return the path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the old format warns about classes without source code
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def load_with_notes(path: Path, options: ModelOptions = NO_OPTIONS) -> tuple[Checkpoint, list[str]]:
    """Load a checkpoint, and return it with the notes about it, without the name of the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = load_checkpoint(path, options)
    assert all(warning.category is FallbackWarning for warning in caught)
    return checkpoint, [str(warning.message).removeprefix(f"{path}: ") for warning in caught]


def load_external(path: Path, model: str | None = None) -> Checkpoint:
    """Load a checkpoint without any note."""
    checkpoint, notes = load_with_notes(path, ModelOptions(model))
    assert not notes
    return checkpoint


def same_outputs(checkpoint: Checkpoint, module: nn.Module) -> bool:
    """Return whether a checkpoint and a module return the same logits, bit for bit, for random images."""
    size = checkpoint.spec.input
    images = torch.rand(2, 3, size.height, size.width)
    with torch.no_grad():
        return torch.equal(checkpoint.build()(images), module.eval()(images))


def new_weights(name: str = "lzh", classes: int = 10) -> dict[str, torch.Tensor]:
    """Return the state dict of a new network."""
    return dict(get_architecture(name).build(classes).state_dict())
