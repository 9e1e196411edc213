import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from cifarx_train.optim.ema import ModelEma


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def train_step(module: nn.Module) -> None:
    """Change every weight in place and run a batch in training mode, as a training step does."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    module.train()(torch.randn(5, 3, 4, 4))


def as_numpy(module: nn.Module) -> dict[str, NDArray[np.float64]]:
    return {name: value.detach().numpy().astype(np.float64) for name, value in module.state_dict().items()}


@given(decay=st.floats(0, 1, exclude_max=True), steps=st.integers(1, 30))
def test_matches_a_direct_computation(decay: float, steps: int) -> None:
    module = net()
    ema = ModelEma(module, decay)
    expected = as_numpy(module)
    for step in range(1, steps + 1):
        train_step(module)
        ema.update(step)
        step_decay = min(decay, (1 + step) / (10 + step))
        for name, value in as_numpy(module).items():
            expected[name] = step_decay * expected[name] + (1 - step_decay) * value
    for name, value in as_numpy(ema.module).items():
        if name == "1.num_batches_tracked":
            assert value == steps
        else:
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_starts_with_the_weights_of_the_model() -> None:
    module = net()
    ema = ModelEma(module, 0.9)
    assert all(np.array_equal(value, as_numpy(module)[name]) for name, value in as_numpy(ema.module).items())


def test_zero_decay_copies_the_model() -> None:
    module = net()
    ema = ModelEma(module, 0.0)
    train_step(module)
    ema.update(1)
    assert all(np.array_equal(value, as_numpy(module)[name]) for name, value in as_numpy(ema.module).items())


def test_the_average_of_constant_weights_is_those_weights() -> None:
    module = net()
    ema = ModelEma(module, 0.99)
    for step in range(1, 20):
        ema.update(step)
    for name, value in as_numpy(ema.module).items():
        np.testing.assert_array_equal(value, as_numpy(module)[name])


def test_the_average_is_a_separate_module_without_gradients() -> None:
    module = net().train()
    ema = ModelEma(module, 0.9)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    average = as_numpy(ema.module)
    train_step(module)
    assert all(np.array_equal(value, average[name]) for name, value in as_numpy(ema.module).items())
    ema.update(1)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not ema.module.training
    assert module.training
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_running_statistics_are_averaged_and_counters_copied() -> None:
    module = net()
    ema = ModelEma(module, 0.5)
    with torch.no_grad():
        module.get_buffer("1.running_mean").fill_(8.0)
        module.get_buffer("1.num_batches_tracked").fill_(7)
    ema.update(1000)
    average = ema.module.state_dict()
    assert average["1.running_mean"].tolist() == [4.0] * 4
    assert int(average["1.num_batches_tracked"]) == 7


@pytest.mark.parametrize("channels_last", [False, True])
def test_supports_both_memory_formats(channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    module = net().to(memory_format=memory_format)
    ema = ModelEma(module, 0.5)
    before = module.get_parameter("0.weight").detach().clone()
    with torch.no_grad():
        module.get_parameter("0.weight").add_(2.0)
    ema.update(1000)
    assert torch.allclose(ema.module.state_dict()["0.weight"], before + 1.0, atol=1e-6)
