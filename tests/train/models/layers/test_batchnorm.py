import pytest
import torch
from torch import nn

from cifarx_train.models.layers.batchnorm import settle_norms
from cifarx_train.models.registry import network


def momentum_after(momentum: float | None, steps: int) -> float | None:
    layer = nn.BatchNorm2d(3, momentum=momentum)
    settle_norms(nn.Sequential(layer), steps)
    return layer.momentum


@pytest.mark.parametrize(
    ("momentum", "steps", "expected"),
    [
        (0.01, 158, 10 / 158),
        (0.01, 50, 0.1),
        (0.01, 7820, 0.01),
        (0.1, 10, 0.1),
        (0.1, 7820, 0.1),
        (0.4, 100, 0.4),
        (None, 100, None),
    ],
)
def test_a_momentum_is_raised_to_what_the_run_needs(momentum: float | None, steps: int, expected: float | None) -> None:
    assert momentum_after(momentum, steps) == expected


def test_statistics_of_a_short_run_are_those_of_its_images() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, momentum=0.01)
    settle_norms(layer, steps := 200)
    for _ in range(steps):
        layer(5 + 2 * torch.randn(16, 3, 4, 4))
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 5.0), rtol=0.05, atol=0)
    torch.testing.assert_close(layer.running_var, torch.full((3,), 4.0), rtol=0.1, atol=0)


def test_nothing_but_the_momentum_changes() -> None:
    module = network("mobilenet_v3_small").build(3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    settle_norms(module, 100)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
