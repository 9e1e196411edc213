"""Two modules are compared by what their layers compute, not by their weights."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.nn import functional
from torchvision import models

from cifarx_train.checkpoints.external.layer_settings import different_settings, same_settings


def resnet() -> models.ResNet:
    return models.resnet18(num_classes=3)


def test_modules_with_other_weights_are_the_same() -> None:
    assert same_settings(resnet(), resnet().eval().requires_grad_(False))


def change_stride(module: models.ResNet) -> None:
    module.conv1.stride = (1, 1)


def change_eps(module: models.ResNet) -> None:
    module.layer1[0].bn1.eps = 1e-3


def remove_pooling(module: models.ResNet) -> None:
    module.maxpool = nn.Identity()


def replace_pooling(module: models.ResNet) -> None:
    module.maxpool = nn.AvgPool2d(3, 2, 1)


def replace_activation(module: models.ResNet) -> None:
    module.layer2[1].relu = nn.SiLU()


def add_layer(module: models.ResNet) -> None:
    module.extra = nn.ReLU()


def change_padding_mode(module: models.ResNet) -> None:
    module.layer1[0].conv1.padding_mode = "reflect"


def replace_function(module: models.ResNet) -> None:
    module._norm_layer = functools.partial(nn.BatchNorm2d, eps=1e-3)


CHANGES: list[Callable[[models.ResNet], None]] = [
    *(change_stride, change_eps, remove_pooling, replace_pooling, replace_activation, add_layer),
    *(change_padding_mode, replace_function),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: Callable[[models.ResNet], None]) -> None:
    changed = resnet()
    change(changed)
    assert not same_settings(changed, resnet())
    assert not same_settings(resnet(), changed)


def test_functions_are_compared() -> None:
    layers = [nn.TransformerEncoderLayer(4, 2, activation=function) for function in (functional.relu, functional.gelu)]
    assert not same_settings(layers[0], layers[1])
    partials = [nn.Sequential(), nn.Sequential()]
    for module in partials:
        module.make = functools.partial(nn.LayerNorm, eps=1e-6)  # type: ignore[assignment]
    assert same_settings(*partials)


def test_differences_are_described() -> None:
    changed = resnet()
    change_stride(changed)
    change_eps(changed)
    replace_activation(changed)
    names = {name: name for name, _ in resnet().named_modules()}
    assert list(different_settings(changed, resnet(), names)) == [
        "conv1.stride is (1, 1), not (2, 2)",
        "layer1.0.bn1.eps is 0.001, not 1e-05",
        "layer2.1.relu is a SiLU, not a ReLU",
    ]


def test_containers_and_unknown_names_are_skipped() -> None:
    container = nn.Module()
    container.net = resnet()
    assert not list(different_settings(container, resnet(), {"": "", "net.conv1": "conv1", "absent": "conv1"}))


def test_lists_that_share_their_items_do_not_take_forever() -> None:
    """Each tuple contains the one before twice, so the last one has 2**60 items."""
    module = resnet()
    nested: Any = "x"
    for _ in range(60):
        nested = (nested, nested)
    module.conv1.extra = nested
    assert same_settings(module, resnet())
