"""Activations beyond float16 are found and named, although a CPU does not show them."""

import math

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifarx_export.formats.activation_range import check_module_range, check_range
from cifarx_export.formats.exported_program import convert_to_exported_program
from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec

SPEC = ModelSpec(
    model="small",
    class_names=tuple("abcde"),
    input=InputSpec(height=8, width=8, value_range=(0, 255)),
    precision="fp16",
)


class Network(nn.Module):
    """A network whose activations are up to 255, and `scale` times that after the first layer."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        self.last = nn.Linear(3, 5, bias=False)
        nn.init.constant_(self.first.weight, scale / 3)
        nn.init.constant_(self.last.weight, 1 / scale)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(images).mean((2, 3)))
        return logits


class FunctionalNetwork(Network):
    """Squares the activations, without a module that does so."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last((self.first(images) ** 2).mean((2, 3)).sqrt())
        return logits


class MaskedNetwork(Network):
    """Masks with the lowest float32, and with infinity."""

    def forward(self, images: Tensor) -> Tensor:
        scores = self.first(images).flatten(2).mean(2)
        masked = scores.masked_fill(scores < 0, torch.finfo(torch.float32).min).softmax(1)
        logits: Tensor = self.last(masked + scores.masked_fill(scores < 0, -math.inf).clamp(min=0))
        return logits


def source(module: nn.Module, images: int = 70) -> ConversionSource:
    pixels = np.random.default_rng(0).integers(0, 200, (images, 8, 8, 3)).astype(np.uint8)
    return ConversionSource(
        module.eval, SPEC, NO_OPTIONS, lambda count: pytest.fail(str(count)), silent, test_images=pixels
    )


def test_activations_in_range() -> None:
    check = check_module_range(source(Network(scale=4)))
    assert check.passed
    # 1020 is that of the white image.
    assert check.found.startswith("activations reach 1020 of 65504 in first (convolution); ")


@pytest.mark.parametrize(
    ("network", "layer", "value"),
    [
        (Network(scale=1000), "first (convolution)", "2.55e+05"),
        (FunctionalNetwork(scale=2), "pow", "2.601e+05"),
    ],
)
def test_the_first_layer_beyond_the_range_is_named(network: nn.Module, layer: str, value: str) -> None:
    check = check_module_range(source(network))
    assert not check.passed
    assert check.found == f"{layer} reaches {value} and overflows on a GPU: the largest float16 is 65504"


def test_masks_are_no_activations() -> None:
    assert check_module_range(source(MaskedNetwork(scale=4))).passed


def test_the_network_keeps_its_hooks_and_weights() -> None:
    network = Network(scale=4)
    check_module_range(source(network))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_the_check_belongs_to_the_artifact() -> None:
    [artifact] = convert_to_exported_program(source(Network(scale=1000)))
    assert [(check.name, check.passed) for check in artifact.checks] == [("float16 range", False)]
    fp32 = ConversionSource(
        Network(scale=1000).eval,
        msgspec.structs.replace(SPEC, precision="fp32"),
        NO_OPTIONS,
        lambda count: pytest.fail(str(count)),
        silent,
    )
    assert not convert_to_exported_program(fp32)[0].checks


def test_limits() -> None:
    assert check_range({"a": 65504.0}).passed
    assert not check_range({"a": 1.0, "b": 65520.0}).passed
    assert check_range({}).passed
