import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from cifarx_train.optim.ema import Ema


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def drift(module: nn.Module) -> None:
    """One step of training, in place: every weight moves, the norm counts a batch."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    module.train()(torch.randn(5, 3, 4, 4))


def as_numpy(module: nn.Module) -> dict[str, NDArray[np.float64]]:
    return {name: value.detach().numpy().astype(np.float64) for name, value in module.state_dict().items()}


@given(decay=st.floats(0, 1, exclude_max=True), steps=st.integers(1, 30))
def test_equals_a_plain_recomputation(decay: float, steps: int) -> None:
    module = net()
    ema = Ema(module, decay)
    expected = as_numpy(module)
    for step in range(1, steps + 1):
        drift(module)
        ema.update(step)
        share = min(decay, (1 + step) / (10 + step))
        for name, value in as_numpy(module).items():
            expected[name] = share * expected[name] + (1 - share) * value
    for name, value in as_numpy(ema.module).items():
        if name == "1.num_batches_tracked":
            assert value == steps
        else:
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_starts_as_the_network_itself() -> None:
    module = net()
    ema = Ema(module, 0.9)
    assert all(np.array_equal(value, as_numpy(module)[name]) for name, value in as_numpy(ema.module).items())


def test_a_decay_of_zero_is_the_network_itself() -> None:
    module = net()
    ema = Ema(module, 0.0)
    drift(module)
    ema.update(1)
    assert all(np.array_equal(value, as_numpy(module)[name]) for name, value in as_numpy(ema.module).items())


def test_a_network_that_stands_still_is_its_own_average() -> None:
    module = net()
    ema = Ema(module, 0.99)
    for step in range(1, 20):
        ema.update(step)
    for name, value in as_numpy(ema.module).items():
        np.testing.assert_array_equal(value, as_numpy(module)[name])


def test_the_average_is_another_module_and_trains_nothing() -> None:
    module = net().train()
    ema = Ema(module, 0.9)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drifted = as_numpy(ema.module)
    drift(module)
    assert all(np.array_equal(value, drifted[name]) for name, value in as_numpy(ema.module).items())
    ema.update(1)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not ema.module.training
    assert module.training
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_running_statistics_are_averaged_and_counts_copied() -> None:
    module = net()
    ema = Ema(module, 0.5)
    with torch.no_grad():
        module[1].running_mean.fill_(8.0)
        module[1].num_batches_tracked.fill_(7)
    ema.update(1000)
    average = ema.module.state_dict()
    assert average["1.running_mean"].tolist() == [4.0] * 4
    assert int(average["1.num_batches_tracked"]) == 7


@pytest.mark.parametrize("channels_last", [False, True])
def test_follows_weights_in_either_memory_layout(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = net().to(memory_format=layout)
    ema = Ema(module, 0.5)
    before = module[0].weight.detach().clone()
    with torch.no_grad():
        module[0].weight.add_(2.0)
    ema.update(1000)
    assert torch.allclose(ema.module.state_dict()["0.weight"], before + 1.0, atol=1e-6)
