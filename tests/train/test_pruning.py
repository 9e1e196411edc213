import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models.lzh import Lzh
from cifarx_train.pruning import fine_tune_pruned, prune_channels, require_share

SPEC = InputSpec(height=32, width=32)


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3), np.uint8)


def _lzh() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Lzh(10).eval()


def _resnet18() -> nn.Module:
    network: nn.Module = torchvision.models.resnet18(num_classes=10)
    return network


def _mobilenet_v3_small() -> nn.Module:
    network: nn.Module = torchvision.models.mobilenet_v3_small(num_classes=10)
    return network


def _widths(network: nn.Module) -> list[int]:
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features for layer in layers]


@pytest.mark.parametrize("build", [_lzh, _resnet18, _mobilenet_v3_small])
def test_each_layer_but_the_last_keeps_a_multiple_of_16_channels_near_its_share(build: Callable[[], nn.Module]) -> None:
    original = build().eval()
    before, batch = _widths(original), torch.rand(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = prune_channels(original, batch, 0.3)
    after = _widths(found.module)
    assert _widths(original) == before
    for kept, width in zip(after[:-1], before[:-1], strict=True):
        assert kept == width <= 16 or (kept % 16 == 0 and 16 <= kept < width and abs(kept - 0.7 * width) <= 8)
    assert after[-1] == before[-1] == 10
    assert not any(module.training for module in found.module.modules())
    outputs = found.module(torch.rand(5, 3, 32, 32))
    assert outputs.shape == (5, 10)
    assert outputs.isfinite().all()
    assert 0.4 < found.weights_removed < 0.6
    assert 0.2 < found.multiplications_removed < 0.7


def test_what_was_removed_is_counted() -> None:
    """Convolutions of 3 to 16, 16 to 16 and 16 to 48 channels, and linear layers of 768 to 48 to 10."""
    found = prune_channels(_lzh(), torch.rand(2, 3, 32, 32), 0.3)
    weights = sum(parameter.numel() for parameter in found.module.parameters())
    assert weights == 16 * 76 + 16 * (16 * 25 + 1) + 48 * (16 * 25 + 1) + 48 * 769 + 10 * 49
    assert found.weights_removed == pytest.approx(1 - weights / 145_578)
    products = 75 * 16 * 1024 + 16 * 16 * 25 * 256 + 16 * 48 * 25 * 64 + 768 * 48 + 480
    before = 75 * 32 * 1024 + 32 * 32 * 25 * 256 + 32 * 64 * 25 * 64 + 1024 * 64 + 640
    assert found.multiplications_removed == pytest.approx(1 - products / before)


def test_the_channels_with_the_smallest_weights_are_removed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 2, 3), nn.Flatten(), nn.Linear(1568, 10))
    layer = network[0]
    assert isinstance(layer, nn.Conv2d)
    with torch.no_grad():
        layer.weight[1::2] *= 1e-3
    found = prune_channels(network, torch.rand(2, 3, 32, 32), 0.5)
    kept = found.module.get_submodule("0").weight
    assert isinstance(kept, Tensor)
    assert torch.equal(kept, layer.weight[::2])


def test_a_network_loses_the_same_channels_each_time() -> None:
    batch = torch.rand(2, 3, 32, 32)
    first, second = (prune_channels(_lzh(), batch, 0.5).module.state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_learns_to_answer_as_the_original(images: NDArray[np.uint8]) -> None:
    original = _lzh()
    pruned = prune_channels(original, torch.rand(2, 3, 32, 32), 0.3).module
    batch = torch.rand(32, 3, 32, 32)
    before = (pruned(batch) - original(batch)).square().mean().item()
    weights = {name: value.clone() for name, value in original.state_dict().items()}
    assert fine_tune_pruned(pruned, original, images, SPEC, steps=8) == 8
    assert (pruned(batch) - original(batch)).square().mean().item() < 0.8 * before
    assert all(torch.equal(original.state_dict()[name], value) for name, value in weights.items())


def test_batch_normalization_learns_new_statistics_and_dropout_stays_off(images: NDArray[np.uint8]) -> None:
    layers = [nn.Conv2d(3, 32, 3, 4), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(2048, 10)]
    original = nn.Sequential(*layers).eval()
    pruned = prune_channels(original, torch.rand(2, 3, 32, 32), 0.5).module
    before = pruned.state_dict()["1.running_mean"].clone()
    modes: set[tuple[bool, bool]] = set()
    pruned.register_forward_hook(lambda *_: modes.add((pruned.get_submodule("1").training, pruned[3].training)))  # type: ignore[index]
    fine_tune_pruned(pruned, original, images, SPEC, steps=2)
    assert modes == {(True, False)}
    assert not torch.equal(pruned.state_dict()["1.running_mean"], before)
    assert not any(module.training for module in pruned.modules())


def test_ends_when_the_time_is_over(images: NDArray[np.uint8]) -> None:
    original = _lzh()
    pruned = prune_channels(original, torch.rand(2, 3, 32, 32), 0.3).module
    assert fine_tune_pruned(pruned, original, images, SPEC, seconds=0.01) < 10


class _FixedWidth(nn.Module):
    """A network with the width of a layer in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 32, 3, 8)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).view(len(x), 32, 16).mean(2))
        return logits


@pytest.mark.parametrize(
    ("network", "words"),
    [(_FixedWidth(), "the network cannot be pruned .*leave --prune out"), (nn.Flatten(), "cannot be pruned")],
)
def test_networks_that_cannot_be_pruned_are_usage_errors(network: nn.Module, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        prune_channels(network, torch.rand(2, 3, 32, 32), 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("narrow", [[], [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 3, 3, padding=2)]])
def test_an_output_layer_and_narrow_layers_leave_nothing_to_remove(narrow: list[nn.Module]) -> None:
    network = nn.Sequential(*narrow, nn.Flatten(), nn.Linear(3072, 10))
    with pytest.raises(UsageError, match="no layer has channels that can be removed"):
        prune_channels(network, torch.rand(2, 3, 32, 32), 0.5)


def test_images_are_needed() -> None:
    with pytest.raises(UsageError, match="no training images"):
        fine_tune_pruned(_lzh(), _lzh(), np.zeros((0, 32, 32, 3), np.uint8), SPEC)


@pytest.mark.parametrize("share", [0, -0.1, 0.91, 30, float("nan")])
def test_shares_are_above_zero_and_below_one(share: float) -> None:
    with pytest.raises(UsageError, match=r"no share of channels.*--prune 0\.3"):
        require_share(share)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match=r'pip install "cifarx\[prune\]"'):
        prune_channels(_lzh(), torch.rand(2, 3, 32, 32), 0.5)
