"""Planted wrong guesses: each artifact answers as its author's own module does, or there is none.

The author's module and images are used as they are, outside of cifarx: a guess that the export shares with its own
reference would pass the parity check, and only such a comparison finds it.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

import cifarx
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import FallbackWarning, UsageError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.spec import InputSpec
from cifarx_train.data.selection import select_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IMAGES = 200
NAMES = tuple(f"kind {letter}" for letter in "zyxwvutsrq")


@pytest.fixture(autouse=True)
def _few_images_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the parity checks, which are not what is tested: they take most of the time."""
    monkeypatch.setattr("cifarx_export.parity.compare.SUBSET_IMAGES", 100)


@pytest.fixture(scope="module")
def images() -> Any:
    """Drawings of the built-in data, uint8 (N, 32, 32, 3)."""
    return select_dataset("builtin").load("test", InputSpec(height=32, width=32)).images[:IMAGES]


def resnet(**options: Any) -> models.ResNet:
    """Return a small ResNet with BatchNorm statistics of its own, so that eps matters."""
    torch.manual_seed(0)
    module = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, **options)
    module.layer3 = module.layer4 = nn.Identity()
    module.fc = nn.Linear(128, 10)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.uniform_(buffer)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 1e-3, 1e-1)
    return module.eval()


def stem_with_pooling(module: Any) -> None:
    module.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)


def stride(module: Any) -> None:
    module.conv1.stride = (1, 1)


def eps(module: Any) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-2


def activation(module: Any) -> None:
    for layer in module.modules():
        if hasattr(layer, "relu"):
            layer.relu = nn.SiLU()


def average_pooling(module: Any) -> None:
    module.maxpool = nn.AvgPool2d(3, 2, 1)


def no_pooling(module: Any) -> None:
    module.maxpool = nn.Identity()


def padding_mode(module: Any) -> None:
    module.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False, padding_mode="reflect")


def head(module: Any) -> None:
    module.fc = nn.Sequential(nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 10), nn.LogSoftmax(1))


CHANGES: list[Callable[[Any], None]] = [
    *(stem_with_pooling, stride, eps, activation, average_pooling, no_pooling, padding_mode, head),
]


def artifact_logits(path: Path, images: Any, **options: Any) -> Any:
    """Export a checkpoint to ONNX, and return what the artifact answers and its spec."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        (result,) = cifarx.export(path, ["onnx"], data="builtin", **options)
    assert result.report.summary.passed
    with open_backend(result.path, device="cpu") as backend:
        return backend.run(model_input(images, backend.spec)), backend.spec


def author_logits(module: nn.Module, images: Any) -> Any:
    """Return what the author's module answers to the author's own preprocessing, which only scales to 0..1."""
    with torch.no_grad():
        return module.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(255))).numpy()


def agree(a: Any, b: Any) -> bool:
    return bool((a.argmax(1) == b.argmax(1)).all() and np.allclose(a, b, rtol=1e-4, atol=1e-4))


@pytest.mark.parametrize("change", CHANGES)
def test_the_layers_of_a_whole_model(tmp_path: Path, images: Any, change: Callable[[Any], None]) -> None:
    module = resnet()
    usual = author_logits(resnet(), images)
    change(module)
    expected = author_logits(module, images)
    assert not agree(usual, expected), "the change must matter"
    torch.save(module, tmp_path / "whole.pth")
    found, spec = artifact_logits(tmp_path / "whole.pth", images)
    assert agree(found, expected)
    assert spec.assumed == ("class_names", "preprocessing", "output")


@pytest.mark.parametrize("change", CHANGES)
def test_the_layers_of_a_state_dict_are_not_guessed(tmp_path: Path, change: Callable[[Any], None]) -> None:
    module = models.resnet18(num_classes=10)
    module.fc = nn.Linear(512, 10)
    if change is not head:
        change(module)
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match="weights without their network; names and shapes fit resnet18"):
        cifarx.export(tmp_path / "weights.pth", ["onnx"], data="builtin")
    assert not list(tmp_path.glob("*.onnx"))


def test_an_option_of_the_network(tmp_path: Path, images: Any) -> None:
    module = models.googlenet(num_classes=10, transform_input=True, aux_logits=False, init_weights=False).eval()
    torch.save(module, tmp_path / "whole.pth")
    assert agree(artifact_logits(tmp_path / "whole.pth", images)[0], author_logits(module, images))


def test_averaged_weights_and_the_order_of_the_names(tmp_path: Path, images: Any) -> None:
    raw, averaged = models.squeezenet1_1(num_classes=10), models.squeezenet1_1(num_classes=10)
    content = {
        "state_dict": {f"module.{key}": value for key, value in raw.half().state_dict().items()},
        "state_dict_ema": averaged.state_dict(),
        "class_to_idx": dict(sorted((name, label) for label, name in enumerate(NAMES))),
        "classes": sorted(NAMES),
    }
    torch.save(content, tmp_path / "x.pth.tar")
    found, spec = artifact_logits(tmp_path / "x.pth.tar", images, model="squeezenet1_1")
    assert agree(found, author_logits(averaged, images))
    assert not agree(found, author_logits(raw.float(), images))
    assert spec.class_names == NAMES
    assert spec.assumed == ("preprocessing", "output")
