import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_train.logit_matching import BATCH_SIZE
from cifarx_train.quantization_aware import _insert_rounding, _trace, fine_tune_for_int8
from tests.support.int8_networks import SPEC, AttentionNetwork, ResidualNetwork

LEVELS = 64


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3), np.uint8)


def _network(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ResidualNetwork, AttentionNetwork])
def test_learns_to_answer_as_before_with_rounded_weights(kind: type[nn.Module], images: NDArray[np.uint8]) -> None:
    network = _network(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    lines: list[str] = []
    found = fine_tune_for_int8(network, images, SPEC.input, steps=100, progress=lines.append)
    assert found.steps == 100
    assert found.after < 0.9 * found.before
    assert [line.startswith("int8: fine-tuning, step") for line in lines] == [True, True]
    assert found.weights.keys() == before.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", [ResidualNetwork, AttentionNetwork])
def test_int8_holds_the_weights_exactly(kind: type[nn.Module], images: NDArray[np.uint8]) -> None:
    network = _network(kind)
    found = fine_tune_for_int8(network, images, SPEC.input, steps=2)
    network.load_state_dict(found.weights)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert layers
    for layer in layers:
        weight = layer.weight.detach().flatten(1)
        scale = weight.abs().amax(1, keepdim=True) / LEVELS
        assert torch.allclose(weight / scale, (weight / scale).round(), atol=1e-4)


def test_batch_normalization_keeps_its_statistics(images: NDArray[np.uint8]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10))
    network(torch.rand(2, 3, 32, 32))
    statistics = network.state_dict()["1.running_mean"].clone()
    found = fine_tune_for_int8(network, images, SPEC.input, steps=2)
    assert torch.equal(found.weights["1.running_mean"], statistics)


def test_rounds_where_the_conversion_does() -> None:
    """The input, the ReLU after the normalization, the pooled layer, and the residual sum, but not the logits."""
    network = _network(ResidualNetwork)
    traced = _trace(network, torch.zeros(BATCH_SIZE, 3, 32, 32))
    weights, activations = _insert_rounding(traced)
    assert weights == ["stem.weight", "deep.weight", "wide.weight", "head.weight"]
    assert len(activations) == 5
    assert not any(node.op == "output" and node.args[0][0].op == "call_module" for node in traced.graph.nodes)


def test_ends_when_the_time_is_over(images: NDArray[np.uint8]) -> None:
    assert fine_tune_for_int8(_network(ResidualNetwork), images, SPEC.input, seconds=0.2).steps < 1000


class _Branching(nn.Module):
    """A network that cannot be traced, because its path depends on its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("network", "count", "words"),
    [
        (nn.Flatten(), 8, "no layer that can be fine-tuned"),
        (_Branching(), 8, "cannot be traced"),
        (nn.Linear(4, 4), 0, "no training images"),
    ],
)
def test_networks_that_cannot_be_fine_tuned_are_usage_errors(network: nn.Module, count: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fine_tune_for_int8(network, np.zeros((count, 32, 32, 3), np.uint8), SPEC.input)
