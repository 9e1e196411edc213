"""The layer in which float16 loses most is found, for operations inside and outside of modules."""

import re

import pytest
import torch
from torch import Tensor, nn

from cifarx_export.formats.fp16 import convert_module_to_fp16
from cifarx_export.formats.rounding_errors import describe_rounding


class Canceling(nn.Module):
    """Adds and subtracts a large number: float16 cannot represent the small difference beside it."""

    def forward(self, images: Tensor) -> Tensor:
        return (images + 2000.0) - 2000.0


class InPlace(nn.Module):
    """The same in place, through a view."""

    def forward(self, images: Tensor) -> Tensor:
        changed = images.clone()
        changed[:].add_(2000.0).sub_(2000.0)
        return changed


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(*parts: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *parts, nn.Conv2d(4, 4, 3)).eval()


@pytest.mark.parametrize("part", [Canceling(), InPlace()])
def test_the_layer_is_named(part: nn.Module) -> None:
    found = describe_rounding(network(part), images())
    assert found.startswith("rounding errors grow most in 3 (sub), from 0.")
    assert found.endswith("% of its values")


def test_the_errors_are_those_of_the_network_in_float16() -> None:
    module = network(Canceling())
    with torch.no_grad():
        half = convert_module_to_fp16(module[:4])(images())
        exact = module[:4](images())
    error = float((half - exact).norm() / exact.norm())
    assert f"to {error:.2%} of its values" in describe_rounding(module, images())


def test_an_overflow_is_the_largest_loss() -> None:
    class Scaled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images * 1e4 * 1e4 * 1e-8

    assert "3 (mul)" in describe_rounding(network(Scaled()), images())
    assert "to inf% of" in describe_rounding(network(Scaled()), images())


class Attention(nn.MultiheadAttention):
    """Attention of tokens to themselves."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        attended: Tensor = super().forward(tokens, tokens, tokens, need_weights=False)[0]
        return attended


def test_statistics_near_zero_are_no_outputs() -> None:
    layers = (nn.Hardswish(), nn.AdaptiveAvgPool2d(4), nn.Flatten(2), nn.LayerNorm(16), nn.LayerNorm(16))
    module = nn.Sequential(nn.Conv2d(3, 4, 3), *layers, Attention(16, 2, batch_first=True)).eval()
    # The mean that the second LayerNorm computes is zero, so its relative error is large.
    assert re.search(r", from 0\.\d+% to 0\.\d+% of its values$", describe_rounding(module, images()))


def test_the_network_is_not_changed() -> None:
    module = network(Canceling())
    before = [value.clone() for value in module.state_dict().values()]
    describe_rounding(module, images())
    assert all(map(torch.equal, before, module.state_dict().values()))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
