import pytest
import torch
from torch import nn

from cifarx_train.models.layers.batchnorm import raise_batchnorm_momentum
from cifarx_train.models.registry import get_architecture


def momentum_after(momentum: float | None, steps: int) -> float | None:
    layer = nn.BatchNorm2d(3, momentum=momentum)
    raise_batchnorm_momentum(nn.Sequential(layer), steps)
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
def test_the_momentum_is_raised_as_far_as_the_run_requires(
    momentum: float | None, steps: int, expected: float | None
) -> None:
    assert momentum_after(momentum, steps) == expected


def test_the_statistics_converge_in_a_short_run() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, momentum=0.01)
    raise_batchnorm_momentum(layer, steps := 200)
    for _ in range(steps):
        layer(5 + 2 * torch.randn(16, 3, 4, 4))
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 5.0), rtol=0.05, atol=0)
    torch.testing.assert_close(layer.running_var, torch.full((3,), 4.0), rtol=0.1, atol=0)


def test_weights_and_buffers_do_not_change() -> None:
    module = get_architecture("mobilenet_v3_small").build(3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    raise_batchnorm_momentum(module, 100)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
