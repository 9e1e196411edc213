"""A whole model is built again exactly as its author built it, or refused. Nothing of the file runs."""

import argparse
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torchvision import models, ops

from cifarx_serve.errors import ModelFileError
from cifarx_train.checkpoints.external.module_stub import is_module
from cifarx_train.checkpoints.external.torch_file import load_torch_file
from cifarx_train.checkpoints.external.whole_model import (
    FindClass,
    UnavailableObject,
    library_classes,
    rebuild_module,
)
from tests.support.external_checkpoints import both_formats, save
from tests.support.hostile_pickles import module_with_state


def rebuilt(tmp_path: Path, module: nn.Module, find_class: FindClass | None = None, zipped: bool = True) -> nn.Module:
    """Save a module and build it again."""
    path = save(module, tmp_path / "x.pth", zipped)
    stub = load_torch_file(path)
    assert is_module(stub)
    return rebuild_module(path, stub, find_class or library_classes().get)


def same_outputs(a: nn.Module, b: nn.Module, *shape: int) -> bool:
    """Return whether two modules return the same values, bit for bit."""
    images = torch.rand(2, *(shape or (3, 64, 64)))
    with torch.no_grad():
        return torch.equal(a.eval()(images), b.eval()(images))


FAST = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")
SLOW = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mobilenet_v2", "regnet_y_400mf", "resnet18", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16"),
]


def network(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    module: nn.Module = models.get_model(name, weights=None, num_classes=4, **options)
    return module


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_networks_of_torchvision(tmp_path: Path, name: str) -> None:
    module = network(name)
    side = 224 if name in ("maxvit_t", "vit_b_16") else 96
    assert same_outputs(rebuilt(tmp_path, module), module, 3, side, side)


@both_formats
def test_both_formats(tmp_path: Path, zipped: bool) -> None:
    module = network("squeezenet1_1")
    again = rebuilt(tmp_path, module, zipped=zipped)
    assert type(again) is models.SqueezeNet
    assert same_outputs(again, module)


# --- planted differences from the original network: each one changes the answers


def resnet() -> models.ResNet:
    """Return a small ResNet, with half of the groups of blocks."""
    module = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    module.layer3 = module.layer4 = nn.Identity()
    module.fc = nn.Linear(128, 4)
    return module


def stem(module: models.ResNet) -> None:
    module.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # the max-pooling is kept


def stride(module: models.ResNet) -> None:
    module.layer2[0].conv1.stride = (1, 1)
    module.layer2[0].downsample[0].stride = (1, 1)


def padding(module: models.ResNet) -> None:
    module.conv1.padding = (1, 1)


def padding_mode(module: models.ResNet) -> None:
    module.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False, padding_mode="reflect")


def dilation(module: models.ResNet) -> None:
    module.layer1[0].conv1.dilation, module.layer1[0].conv1.padding = (2, 2), (2, 2)


def eps(module: models.ResNet) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-2


def activation(module: models.ResNet) -> None:
    for layer in module.modules():
        if hasattr(layer, "relu"):
            layer.relu = nn.SiLU()


def no_pooling(module: models.ResNet) -> None:
    module.maxpool = nn.Identity()


def average_pooling(module: models.ResNet) -> None:
    module.maxpool = nn.AvgPool2d(3, 2, 1)


def pooling_size(module: models.ResNet) -> None:
    module.maxpool.kernel_size = 2


def max_at_the_end(module: models.ResNet) -> None:
    module.avgpool = nn.AdaptiveMaxPool2d(1)


def head(module: models.ResNet) -> None:
    module.fc = nn.Sequential(nn.Linear(128, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 4), nn.LogSoftmax(1))


def no_norm(module: models.ResNet) -> None:
    module.bn1 = nn.Identity()


def skipped_block(module: models.ResNet) -> None:
    module.layer1 = nn.Identity()


DIFFERENCES: list[Callable[[models.ResNet], None]] = [
    *(stem, stride, padding, padding_mode, dilation, eps, activation, no_pooling, average_pooling, pooling_size),
    *(max_at_the_end, head, no_norm, skipped_block),
]


@pytest.mark.parametrize("change", DIFFERENCES)
def test_a_changed_resnet_is_not_taken_for_a_resnet(tmp_path: Path, change: Callable[[models.ResNet], None]) -> None:
    module, original = resnet(), resnet()
    change(module)
    weights = {key: value for key, value in module.state_dict().items() if key in original.state_dict()}
    if change not in (stem, head):  # their weights have other shapes
        original.load_state_dict(weights, strict=False)
    again = rebuilt(tmp_path, module)
    assert same_outputs(again, module)
    assert not same_outputs(again, original)


def test_an_option_of_googlenet(tmp_path: Path) -> None:
    module = models.googlenet(num_classes=4, transform_input=True, init_weights=False)
    again = rebuilt(tmp_path, module)
    assert again.transform_input is True
    assert same_outputs(again, module)


def test_strides_of_mobilenet(tmp_path: Path) -> None:
    module = models.mobilenet_v2(num_classes=4)
    module.features[0][0].stride = (1, 1)
    module.features[2].conv[1][0].stride = (1, 1)
    assert same_outputs(rebuilt(tmp_path, module), module)


OTHER_MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Sequential(nn.Sequential(*list(models.resnet18().children())[:-1]), nn.Flatten(), nn.Linear(512, 3)), ()),
    (nn.Sequential(OrderedDict(a=nn.Conv2d(3, 2, 3, groups=1), b=nn.PReLU(), c=nn.InstanceNorm2d(2))), ()),
    (nn.Sequential(nn.Flatten(2), nn.LSTM(64 * 64, 5, 2, batch_first=True, bidirectional=True)), ()),
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), 2), (5, 8)),
    (nn.TransformerEncoderLayer(8, 2, 16, activation=functional.silu, batch_first=True, norm_first=True), (5, 8)),
    (nn.Sequential(ops.Conv2dNormActivation(3, 4, activation_layer=nn.Hardswish), ops.SqueezeExcitation(4, 2)), ()),
    (nn.Sequential(ops.StochasticDepth(0.5, "row"), ops.FrozenBatchNorm2d(3)), ()),
    (nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.PixelShuffle(1), nn.ZeroPad2d(1)), ()),
]


@pytest.mark.parametrize(("module", "shape"), OTHER_MODULES)
def test_other_modules(tmp_path: Path, module: nn.Module, shape: tuple[int, ...]) -> None:
    again = rebuilt(tmp_path, module)
    images = torch.rand(2, *(shape or (3, 64, 64)))
    with torch.no_grad():
        found, expected = again(images), module.eval()(images)
    if isinstance(expected, tuple):
        found, expected = found[0], expected[0]
    assert torch.equal(found, expected)


def test_shared_modules_and_parameters_stay_shared(tmp_path: Path) -> None:
    activation, layer = nn.ReLU(), nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    again = rebuilt(tmp_path, nn.Sequential(layer, activation, tied, activation))
    assert isinstance(again, nn.Sequential)
    assert again[1] is again[3]
    assert again[0].weight is again[2].weight


def test_buffers_and_their_persistence(tmp_path: Path) -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    module.register_buffer("table", torch.arange(3.0), persistent=False)
    module.register_buffer("nothing", None)
    again = rebuilt(tmp_path, module)
    assert list(again.state_dict()) == list(module.state_dict())
    assert torch.equal(again.get_buffer("table"), torch.arange(3.0))
    assert again.nothing is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    module = network("squeezenet1_1").to(dtype)
    again = rebuilt(tmp_path, module)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32}
    assert same_outputs(again, module.float())


def test_pruned_weights_are_folded(tmp_path: Path) -> None:
    module = resnet()
    names = set(module.state_dict())
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(module.conv1, "weight", 0.3)
    again = rebuilt(tmp_path, module)
    assert set(again.state_dict()) == names
    assert same_outputs(again, module)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrappers_are_removed(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = network("squeezenet1_1")
    again = rebuilt(tmp_path, wrap(module))
    assert type(again) is models.SqueezeNet
    assert same_outputs(again, module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript, which the compiler of PyTorch 2.11 uses
def test_a_compiled_module(tmp_path: Path) -> None:
    module = network("squeezenet1_1")
    compiled: Any = torch.compile(module)
    assert same_outputs(rebuilt(tmp_path, compiled), module)
    layer: Any = torch.compile(nn.Linear(2, 2))
    part = nn.Sequential(layer, nn.ReLU())
    assert [type(child) for child in rebuilt(tmp_path, part).children()] == [nn.Linear, nn.ReLU]


# --- the user's classes


class Settings:
    """Plain settings of a network."""

    def __init__(self) -> None:
        self.scale = 2.0
        self.dims = [1, 2]


class Net(nn.Module):
    """A network of the user."""

    kind: type[nn.Module] = nn.ReLU

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.settings = Settings()
        self.act = functional.gelu
        self.function = torch.tanh
        self.layer = functools.partial(nn.LayerNorm, eps=1e-6)
        self.kind = nn.GELU
        self.options = argparse.Namespace(width=2, names=["a"])
        self.more = types.SimpleNamespace(depth=(1, 2))
        self.dtype = torch.float32
        self.table = torch.arange(2.0)
        self.rate = np.float64(0.5)
        self.sizes = {"a": [torch.Size([1])], 2: {3}}
        self.me = [self]
        self.path = Path("somewhere")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.function(self.act(self.conv(images))) * self.settings.scale * float(self.rate)


def find_net(name: str) -> type[Any] | None:
    return library_classes().get(name) or {"Net": Net, "Settings": Settings}.get(name.rpartition(".")[2])


def test_a_class_of_the_user_with_its_attributes(tmp_path: Path) -> None:
    module = Net()
    again: Any = rebuilt(tmp_path, module, find_net)
    assert type(again) is Net
    assert same_outputs(again, module)
    assert (again.settings.scale, again.settings.dims) == (2.0, [1, 2])
    assert (again.act, again.kind, again.dtype) == (functional.gelu, nn.GELU, torch.float32)
    assert (again.layer.func, again.layer.keywords) == (nn.LayerNorm, {"eps": 1e-6})
    assert (again.options.width, again.options.names, again.more.depth) == (2, ["a"], (1, 2))
    assert (again.rate, again.sizes) == (0.5, {"a": [torch.Size([1])], 2: {3}})
    assert torch.equal(again.table, torch.arange(2.0))
    assert again.me[0] is again


def test_what_cannot_be_taken_over_fails_when_it_is_used(tmp_path: Path) -> None:
    again: Any = rebuilt(tmp_path, Net(), find_net)
    for use in (str.__len__, bool, len, list, float):
        with pytest.raises((ModelFileError, TypeError), match=r"uses Net\.path, a pathlib\.PosixPath|requires a 'str'"):
            use(again.path)
    for attribute in ("exists", "name"):
        with pytest.raises(ModelFileError, match=r"uses Net\.path"):
            getattr(again.path, attribute)
    assert type(again.path) is UnavailableObject


def test_an_unknown_class_is_named(tmp_path: Path) -> None:
    path = save(Net(), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"needs the class .*\.Net, which .*--model FILE\.py:CALLABLE"):
        rebuild_module(path, load_torch_file(path), library_classes().get)


def test_an_unknown_class_of_a_library_is_named(tmp_path: Path) -> None:
    class Removed(nn.Module):
        pass

    Removed.__module__, Removed.__qualname__ = "torchvision.models.mobilenet", "ConvBNReLU"
    models.mobilenet.ConvBNReLU = Removed
    try:
        path = save(nn.Sequential(Removed()), tmp_path / "x.pth")
    finally:
        del models.mobilenet.ConvBNReLU
    with pytest.raises(ModelFileError, match=r"ConvBNReLU, which is not a layer or network of the installed"):
        rebuild_module(path, load_torch_file(path), {**library_classes()}.get)


# --- hostile models


def refused(tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        rebuilt(tmp_path, module)


@pytest.mark.parametrize("value", [nn.Identity(), functional.relu, functools.partial(nn.Linear, 2), 3, torch.zeros(1)])
@pytest.mark.parametrize(
    "name", ["forward", "extra_repr", "to", "float", "eval", "add_module", "__class__", "__call__"]
)
def test_an_attribute_cannot_replace_a_method(tmp_path: Path, name: str, value: Any) -> None:
    state = {**vars(nn.Linear(2, 2)), name: value}
    refused(tmp_path, replaced(nn.Linear(2, 2), state), rf"replaces Linear\.{name}, a method|invalid name")


@pytest.mark.parametrize("part", ["_parameters", "_buffers", "_modules"])
def test_a_part_cannot_replace_a_method(tmp_path: Path, part: str) -> None:
    value: Any = nn.ReLU() if part == "_modules" else torch.zeros(1)
    state = {**vars(nn.Linear(2, 2)), part: {"forward": value}}
    refused(tmp_path, replaced(nn.Linear(2, 2), state), r"replaces Linear\.forward, a method")


def replaced(module: nn.Module, state: dict[Any, Any]) -> nn.Module:
    """Return the module with other attributes, which its class may not allow."""
    object.__getattribute__(module, "__dict__").clear()
    object.__getattribute__(module, "__dict__").update(state)
    return module


HOOKS = [
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"),
    "_load_state_dict_post_hooks",
]


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_refused(tmp_path: Path, name: str) -> None:
    module = nn.Linear(2, 2)
    getattr(module, name)[0] = functional.relu
    refused(tmp_path, module, rf"a hook of Linear \({name}\)")


def test_a_compiled_call_is_refused(tmp_path: Path) -> None:
    state = {**vars(nn.Linear(2, 2)), "_compiled_call_impl": functional.relu}
    path = save(module_with_state(state), tmp_path / "x.pth")
    stub = load_torch_file(path)
    stub.state["_compiled_call_impl"] = 1
    with pytest.raises(ModelFileError, match=r"a hook of Identity \(_compiled_call_impl\)"):
        rebuild_module(path, stub, library_classes().get)


def test_modules_that_contain_each_other_are_refused(tmp_path: Path) -> None:
    root = nn.Sequential(nn.Sequential())
    root[0]._modules["again"] = root
    refused(tmp_path, root, "the modules in .* contain each other")


def test_deep_modules_and_values_are_refused(tmp_path: Path) -> None:
    module: nn.Module = nn.ReLU()
    values: Any = []
    for _ in range(60):
        module, values = nn.Sequential(module), [values]
    refused(tmp_path, module, "contain each other")
    flat = nn.ReLU()
    flat.values = values
    refused(tmp_path, flat, "contain each other")


def test_values_that_share_their_parts_are_built_once(tmp_path: Path) -> None:
    """Building every part again for each reference to it would take 2**40 steps."""
    value: Any = [1]
    for _ in range(40):
        value = [value, value]
    module = nn.ReLU()
    module.value = value
    again: Any = rebuilt(tmp_path, module)
    assert again.value[0] is again.value[1]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("_parameters", {"weight": 1}, "'weight', which is not a dense tensor"),
        ("_parameters", {"weight": nn.ReLU()}, "'weight', which is not a dense tensor"),
        ("_parameters", {"weight": torch.zeros(2).to_sparse()}, "'weight', which is not a dense tensor"),
        ("_buffers", {"weight": torch.zeros(1).expand(10**12)}, "'weight' in .* is not a dense tensor"),
        ("_modules", {"layer": 1}, r"contains Identity\.layer, which is not a module"),
        ("_modules", {"layer": torch.zeros(1)}, r"contains Identity\.layer, which is not a module"),
        ("_modules", {3: nn.ReLU()}, "a weight with an invalid name"),
        ("_parameters", {"a\n": torch.zeros(1)}, "a weight with an invalid name"),
    ],
)
def test_parts_of_another_type_are_refused(tmp_path: Path, part: str, value: Any, message: str) -> None:
    refused(tmp_path, module_with_state({**vars(nn.Identity()), part: value}), message)


def test_no_constructor_or_other_function_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = resnet()
    module.make = functools.partial(nn.Linear, 2, 2)
    path = save(module, tmp_path / "x.pth")

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a constructor was called")

    for kind in (models.ResNet, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.Sequential):
        monkeypatch.setattr(kind, "__init__", fail)
    again: Any = rebuild_module(path, load_torch_file(path), library_classes().get)
    assert again.make.func is nn.Linear


@pytest.mark.parametrize(
    "name", ["torch.load", "torch.nn.functional.threshold_", "os.system", "torch.hub.load", "eval"]
)
def test_other_functions_are_not_available(tmp_path: Path, name: str) -> None:
    module = nn.ReLU()
    module.function = functional.relu  # type: ignore[assignment]
    path = save(module, tmp_path / "x.pth")
    stub = load_torch_file(path)
    stub.state["function"] = type(stub.state["function"])(name)
    again: Any = rebuild_module(path, stub, library_classes().get)
    assert type(again.function) is UnavailableObject
    with pytest.raises(ModelFileError, match=name):
        again.function("secret")


def test_the_classes_of_the_libraries() -> None:
    classes = library_classes()
    assert classes["torch.nn.modules.conv.Conv2d"] is nn.Conv2d
    assert classes["torchvision.models.resnet.ResNet"] is models.ResNet
    for name in ("torch.fx.graph_module.GraphModule", "torch.jit._script.ScriptModule", "torch.ao.nn.quantized.Linear"):
        assert name not in classes
    assert "torchvision.models.feature_extraction.DualGraphModule" not in classes
