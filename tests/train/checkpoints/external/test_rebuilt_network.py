"""A whole model is the network of its author: of a library, of the training notes, or of the user's code."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.models.options import ModelOptions, SpecOverrides
from cifarx_train.models.registry import get_architecture
from tests.support.external_checkpoints import (
    both_formats,
    load_external,
    load_with_notes,
    lzh_class,
    same_outputs,
    save,
    save_whole_model,
)

# --- Lzh


@both_formats
@pytest.mark.parametrize("module", ["model", "__main__"])
@pytest.mark.parametrize("attribute", ["model", "model1", "module", "net"])
def test_a_whole_lzh_of_the_training_notes(tmp_path: Path, module: str, attribute: str, zipped: bool) -> None:
    path = tmp_path / "lzh_method1.pth"
    saved = save_whole_model(lzh_class(module, attribute=attribute), path, zipped)
    for model in (None, "lzh"):
        checkpoint = load_external(path, model)
        assert checkpoint.spec.model == "lzh"
        assert checkpoint.spec.source == get_architecture("lzh").source
        assert checkpoint.spec.input == InputSpec(height=32, width=32)
        assert list(checkpoint.weights) == list(get_architecture("lzh").build(10).state_dict())
        assert same_outputs(checkpoint, saved)


def change_padding(layers: Any) -> None:
    layers[0].padding_mode = "circular"
    layers[0]._reversed_padding_repeated_twice = [2, 2, 2, 2]


def change_pooling(layers: Any) -> None:
    layers[1] = nn.AvgPool2d(2)


def add_activation(layers: Any) -> None:
    layers[1] = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())


def change_stride(layers: Any) -> None:
    layers[0].stride, layers[1] = (2, 2), nn.Identity()


@pytest.mark.parametrize("change", [change_padding, change_pooling, add_activation, change_stride])
def test_a_changed_lzh_keeps_its_own_layers(tmp_path: Path, change: Callable[[Any], None]) -> None:
    kind = lzh_class("model")
    initialize = vars(kind)["__init__"]

    def changed(self: Any) -> None:
        initialize(self)
        change(self.model)

    kind.__init__ = changed  # type: ignore[method-assign]
    saved = save_whole_model(kind, tmp_path / "x.pth")
    checkpoint = load_external(tmp_path / "x.pth")
    assert checkpoint.spec.source is not None
    assert (checkpoint.spec.model, checkpoint.spec.source.kind) == ("lzh", "checkpoint")
    assert same_outputs(checkpoint, saved)
    with pytest.raises(UsageError, match="a whole model that differs from lzh: leave out --model"):
        load_checkpoint(tmp_path / "x.pth", ModelOptions("lzh"))


def test_another_class_named_lzh(tmp_path: Path) -> None:
    def initialize(self: Any) -> None:
        nn.Module.__init__(self)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    kind = type("Lzh", (nn.Module,), {"__init__": initialize, "__module__": "model"})
    save_whole_model(kind, tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"class model\.Lzh, which is not the Lzh of the training notes"):
        load_checkpoint(tmp_path / "x.pth")


# --- libraries


@both_formats
@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_a_whole_model_of_torchvision(tmp_path: Path, name: str, zipped: bool) -> None:
    saved = models.get_model(name, weights=None, num_classes=10)
    path = save(saved, tmp_path / "x.pth", zipped)
    for model in (None, name):
        checkpoint = load_external(path, model)
        assert checkpoint.spec.source is not None
        assert (checkpoint.spec.source.kind, checkpoint.spec.source.name) == ("checkpoint", "x.pth")
        assert (checkpoint.spec.model, len(checkpoint.spec.class_names)) == (name, 10)
        assert (checkpoint.spec.input.height, checkpoint.spec.input.width) == (32, 32)
        assert same_outputs(checkpoint, saved)


def test_a_model_that_is_not_the_stated_one(tmp_path: Path) -> None:
    saved = models.squeezenet1_1(num_classes=3)
    saved.features[1] = nn.SiLU()
    path = save(saved, tmp_path / "x.pth")
    for model in ("squeezenet1_1", "resnet18", "lzh"):
        with pytest.raises(UsageError, match=rf"x\.pth contains a whole model that differs from {model}: leave out"):
            load_checkpoint(path, ModelOptions(model))
    assert same_outputs(load_external(path), saved)


def test_any_head_and_any_modules(tmp_path: Path) -> None:
    backbone = models.squeezenet1_1(num_classes=5)
    saved = nn.Sequential(backbone.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 3), nn.LogSoftmax(1))
    checkpoint = load_external(save(nn.DataParallel(saved), tmp_path / "x.pth"))
    assert (checkpoint.spec.model, len(checkpoint.spec.class_names)) == ("sequential", 3)
    assert same_outputs(checkpoint, saved)


def test_one_output_stands_for_two_classes(tmp_path: Path) -> None:
    saved = models.squeezenet1_1(num_classes=1)
    spec = load_external(save(saved, tmp_path / "x.pth")).spec
    assert (spec.outputs, spec.activation, len(spec.class_names)) == (1, "sigmoid", 2)


def test_grayscale_images(tmp_path: Path) -> None:
    saved = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    spec = load_external(save(saved, tmp_path / "x.pth")).spec
    assert (spec.input.channels, spec.input.color) == (1, "L")


def test_the_stated_size_of_the_images(tmp_path: Path) -> None:
    saved = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 30, 4))
    path = save(saved, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"x\.pth does not run with 3x32x32 images .*--image-size"):
        load_checkpoint(path)
    options = ModelOptions(overrides=SpecOverrides({"input": {"height": 20, "width": 30}}))
    checkpoint = load_checkpoint(path, options)
    assert (checkpoint.spec.input.height, checkpoint.spec.input.width) == (20, 30)
    assert same_outputs(checkpoint, saved)


def test_a_model_that_does_not_run(tmp_path: Path) -> None:
    saved = models.squeezenet1_1(num_classes=3)
    del saved.features
    with pytest.raises(UsageError, match=r"x\.pth does not run with 3x32x32 images \(.*features"):
        load_checkpoint(save(saved, tmp_path / "x.pth"))


def test_half_precision_and_averaged_models(tmp_path: Path) -> None:
    raw, averaged = (models.squeezenet1_1(num_classes=3) for _ in range(2))
    content = {"model": raw.half(), "ema": averaged.half(), "epoch": 3, "updates": 7}
    checkpoint, notes = load_with_notes(save(content, tmp_path / "x.pt"))
    assert notes == [
        "using the weights ema (EMA), not model: choose with --weights-key",
        "converted weights from float16 to float32",
    ]
    assert same_outputs(checkpoint, averaged.float())
    checkpoint, _ = load_with_notes(tmp_path / "x.pt", ModelOptions(weights_key="model"))
    assert same_outputs(checkpoint, raw.float())


def test_each_build_is_a_new_module(tmp_path: Path) -> None:
    checkpoint = load_external(save(models.squeezenet1_1(num_classes=3), tmp_path / "x.pth"))
    first: Any = checkpoint.build()
    second: Any = checkpoint.build()
    nn.init.zeros_(first.features[0].weight)
    assert not torch.equal(first.features[0].weight, second.features[0].weight)
    assert not second.training


# --- the user's code

NETS = """
from enum import Enum
from torch import nn
from blocks import Block

class Pool(Enum):
    MEAN = "mean"
    SUM = 2

class Settings:
    pass

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.settings = Settings()
        self.settings.scale = width
        self.pool = Pool.SUM
        self.block = Block(width)
        self.fc = nn.Linear(width, 3)
    def forward(self, x):
        x = self.block(x)
        x = x.sum((2, 3)) if self.pool is Pool.SUM else x.mean((2, 3))
        return self.fc(x) * self.settings.scale

class Two(Net):
    def forward(self, x):
        y = super().forward(x)
        return y, y.softmax(1)

class Loss(nn.Module):
    def forward(self, x, y):
        return x
"""
BLOCKS = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.act = nn.SiLU()
    def forward(self, x):
        return self.act(self.conv(x))
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules `nets.py`, which imports `blocks.py`, in a folder; the result is the imported module `nets`."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "nets.py").write_text(NETS)
    (folder / "blocks.py").write_text(BLOCKS)
    monkeypatch.syspath_prepend(str(folder))
    import importlib

    yield importlib.import_module("nets")
    for name in ("nets", "blocks"):
        sys.modules.pop(name, None)


@both_formats
@pytest.mark.parametrize("main", [False, True])
def test_a_class_of_the_user(tmp_path: Path, nets: Any, zipped: bool, main: bool) -> None:
    saved = nets.Net(5)
    classes = (nets.Net, nets.Settings, nets.Pool) if main else ()
    for kind in classes:  # the script that saved it defined them
        kind.__module__ = "__main__"
        setattr(sys.modules["__main__"], kind.__name__, kind)
    path = save({"model": saved}, tmp_path / "x.pth", zipped)
    for kind in classes:
        delattr(sys.modules["__main__"], kind.__name__)
    with pytest.raises(
        ModelFileError, match=r"needs the class (nets|__main__)\.Net, which .*--model FILE\.py:CALLABLE"
    ):
        load_checkpoint(path)
    checkpoint = load_external(path, f"{tmp_path}/code/nets.py:Net")
    assert checkpoint.spec.source is not None
    assert (checkpoint.spec.model, checkpoint.spec.source.kind) == ("net", "checkpoint")
    assert checkpoint.spec.source.sha256 is not None
    assert len(checkpoint.spec.class_names) == 3
    assert same_outputs(checkpoint, saved)


def test_the_attributes_are_those_of_the_file(tmp_path: Path, nets: Any) -> None:
    saved = nets.Net()
    saved.settings.scale = 9
    saved.block.act = nn.ReLU()
    checkpoint = load_external(save(saved, tmp_path / "x.pth"), f"{tmp_path}/code/nets.py:Net")
    assert same_outputs(checkpoint, saved)


def test_the_output_of_a_model_with_several(tmp_path: Path, nets: Any) -> None:
    saved = nets.Two()
    path = save(saved, tmp_path / "x.pth")
    overrides = SpecOverrides({"source": {"output": 0}})
    checkpoint = load_checkpoint(path, ModelOptions(f"{tmp_path}/code/nets.py:Two", overrides=overrides))
    images = torch.rand(2, 3, 32, 32)
    assert checkpoint.spec.source is not None
    assert checkpoint.spec.source.output == 0
    with torch.no_grad():
        assert torch.equal(checkpoint.build()(images), saved(images)[0])


def test_code_that_does_not_define_the_class(tmp_path: Path, nets: Any) -> None:
    path = save(nets.Net(), tmp_path / "x.pth")
    (tmp_path / "other.py").write_text("class Other: pass\n")
    for name in ("nets", "blocks"):
        del sys.modules[name]
    with pytest.raises(ModelFileError, match=r"needs the class nets\.Net"):
        load_checkpoint(path, ModelOptions(f"{tmp_path}/other.py:Other"))


def test_an_unknown_class_with_the_layers_of_a_stated_network(tmp_path: Path) -> None:
    saved = save_whole_model(lzh_class("nets", "Foo"), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"needs the class nets\.Foo"):
        load_checkpoint(tmp_path / "x.pth")
    assert same_outputs(load_external(tmp_path / "x.pth", "lzh"), saved)


def test_an_unknown_class_with_other_layers_than_the_stated_network(tmp_path: Path) -> None:
    kind = lzh_class("nets", "Foo", attribute="layers")
    initialize = vars(kind)["__init__"]

    def changed(self: Any) -> None:
        initialize(self)
        self.layers[0].stride, self.layers[1] = (2, 2), nn.AvgPool2d(1)

    kind.__init__ = changed  # type: ignore[method-assign]
    save_whole_model(kind, tmp_path / "x.pth")
    message = (
        r"not those of lzh \(layers\.0\.stride is \(2, 2\), not \(1, 1\), layers\.1 is a AvgPool2d, not a MaxPool2d\)"
    )
    with pytest.raises(ModelFileError, match=message):
        load_checkpoint(tmp_path / "x.pth", ModelOptions("lzh"))


@pytest.mark.slow
def test_a_whole_model_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    saved = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    path = save(saved, tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"needs the class timm\.models\.vision_transformer\.VisionTransformer"):
        load_checkpoint(path)
    checkpoint = load_external(path, "timm/vit_tiny_patch16_224")
    assert checkpoint.spec.input.height == 224
    assert "preprocessing" not in checkpoint.spec.assumed
    assert same_outputs(checkpoint, saved)
    saved.blocks[3].attn.scale = 0.5
    with pytest.raises(ModelFileError, match=r"blocks\.3\.attn\.scale is 0\.5, not 0\.125"):
        load_checkpoint(save(saved, tmp_path / "x.pth"), ModelOptions("timm/vit_tiny_patch16_224"))
