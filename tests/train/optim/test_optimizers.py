import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cifarx_train.optim.muon import Muon
from cifarx_train.optim.optimizers import Optimizers, lr_factor
from cifarx_train.recipes import Recipe, load_recipe

MUON = {"optimizer": "muon", "bias_lr": 0.05, "head_lr": 0.6, "momentum": 0.6, "nesterov": True}
fractions = st.floats(0, 1, exclude_max=True)
schedules = st.sampled_from(["constant", "linear", "cosine"])

KINDS: dict[str, dict[str, Any]] = {
    "plain sgd": {},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "muon": MUON,
}


def make_recipe(**values: Any) -> Recipe:
    return load_recipe("notes", overrides={"learning_rate": 0.25, **values})


def net() -> nn.Sequential:
    """A model with two convolutions, a norm, a hidden linear layer and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.Linear(5, 3),
    )


def with_gradients(module: nn.Module, seed: int | None = 0) -> nn.Module:
    """Set random gradients, or zero gradients if `seed` is None."""
    source = torch.Generator().manual_seed(seed or 0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=source)
        parameter.grad = noise if seed is not None else torch.zeros_like(parameter)
    return module


def step(optimizers: Optimizers) -> None:
    for optimizer in optimizers.optimizers:
        optimizer.step()


def copy_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def updates(module: nn.Module, recipe: Recipe, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Run one step of the optimizers and return the change of every parameter."""
    before, optimizers = copy_parameters(module), Optimizers(module, recipe)
    optimizers.set_lr(factor)
    step(optimizers)
    return {name: parameter - before[name] for name, parameter in copy_parameters(module).items()}


def test_plain_sgd_follows_the_gradient() -> None:
    module = with_gradients(net())
    expected = {name: -0.25 * value.grad for name, value in module.named_parameters() if value.grad is not None}
    for name, moved in updates(module, make_recipe()).items():
        assert torch.allclose(moved, expected[name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_only_weights_decay(kind: str) -> None:
    module = with_gradients(net(), None)
    before = copy_parameters(module)
    for name, moved in updates(module, make_recipe(**KINDS[kind])).items():
        # Nesterov momentum also applies to the first step.
        rate = 0.25 * 0.01 * (1.9 if kind == "sgd" else 1.0)
        decay = -rate * before[name] if before[name].ndim > 1 else torch.zeros_like(moved)
        assert torch.allclose(moved, decay, atol=1e-7), name


def test_with_muon_biases_and_norms_do_not_decay() -> None:
    module = with_gradients(net(), None)
    with torch.no_grad():
        module.get_parameter("0.bias").fill_(1.0)
    moved = updates(module, make_recipe(**MUON, weight_decay=0.01))
    assert {name for name, update in moved.items() if update.ndim < 2 and update.any()} == set()


@pytest.mark.parametrize("kind", list(KINDS))
def test_set_lr_scales_the_peak_of_every_group(kind: str) -> None:
    optimizers = Optimizers(net(), make_recipe(**KINDS[kind]))
    groups = [group for optimizer in optimizers.optimizers for group in optimizer.param_groups]
    peaks = {float(group["lr"]) for group in groups}
    assert peaks == ({0.25, 0.05, 0.6} if kind == "muon" else {0.25})
    for factor in (0.5, 1.0, 0.125):
        optimizers.set_lr(factor)
        assert {float(group["lr"]) for group in groups} == {peak * factor for peak in peaks}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_learning_rate_of_zero_changes_nothing(kind: str) -> None:
    module = with_gradients(net())
    for name, moved in updates(module, make_recipe(**KINDS[kind]), factor=0.0).items():
        if kind == "muon" and moved.ndim > 1 and name != "5.weight":
            continue  # Muon normalizes filters in every step
        assert not moved.any(), name


def test_muon_trains_the_filters_and_sgd_the_rest() -> None:
    module = net()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizers = Optimizers(module, make_recipe(**MUON))
    rates = {
        names[id(parameter)]: (type(optimizer), group["lr"])
        for optimizer in optimizers.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    filters, biases, head = (Muon, 0.25), (torch.optim.SGD, 0.05), (torch.optim.SGD, 0.6)
    assert rates == {
        "0.weight": filters,
        "0.bias": biases,
        "1.weight": biases,
        "1.bias": biases,
        "2.weight": filters,
        "4.weight": filters,
        "4.bias": biases,
        "5.weight": head,
        "5.bias": biases,
    }


def test_muon_trains_a_model_without_biases() -> None:
    module = with_gradients(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False)))
    assert all(moved.any() for moved in updates(module, make_recipe(**MUON)).values())


@pytest.mark.parametrize("kind", list(KINDS))
def test_frozen_parameters_are_unchanged(kind: str) -> None:
    module = net()
    module[1].weight.requires_grad_(False)
    module[2].weight.requires_grad_(False)
    for name, moved in updates(with_gradients(module), make_recipe(**KINDS[kind])).items():
        assert moved.any() == (name not in ("1.weight", "2.weight")), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_zero_grad_resets_gradients(kind: str) -> None:
    module = with_gradients(net())
    Optimizers(module, make_recipe(**KINDS[kind])).zero_grad()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_resumes_from_the_state_dict(kind: str) -> None:
    recipe = make_recipe(**KINDS[kind])
    whole = net()
    optimizers = Optimizers(whole, recipe)
    for number in range(3):
        with_gradients(whole, number)
        step(optimizers)
    half, state = copy.deepcopy(whole), copy.deepcopy(optimizers.state_dict())
    again = Optimizers(half, recipe)
    again.load_state_dict(state)
    for number in range(3, 6):
        for module, own in ((whole, optimizers), (half, again)):
            with_gradients(module, number)
            own.set_lr(0.5)
            step(own)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, half.state_dict()[name]), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_state_can_be_loaded_with_weights_only(kind: str, tmp_path: Any) -> None:
    module = with_gradients(net())
    optimizers = Optimizers(module, make_recipe(**KINDS[kind]))
    step(optimizers)
    torch.save(optimizers.state_dict(), tmp_path / "state.pt")
    Optimizers(net(), make_recipe(**KINDS[kind])).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_loading_a_state_keeps_the_learning_rates_of_the_recipe() -> None:
    first = Optimizers(net(), make_recipe())
    first.set_lr(0.1)
    second = Optimizers(net(), make_recipe(learning_rate=0.5))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.set_lr(0.5)
    assert [float(group["lr"]) for optimizer in second.optimizers for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("saved_on_gpu", "loaded_on_gpu"), [(True, False), (False, True), (True, True)])
def test_the_state_of_another_device_is_loaded(kind: str, saved_on_gpu: bool, loaded_on_gpu: bool) -> None:
    recipe = make_recipe(**KINDS[kind])

    def module_like(on_gpu: bool) -> nn.Module:
        return net().to(memory_format=torch.channels_last if on_gpu else torch.contiguous_format)

    def run(module: nn.Module, optimizers: Optimizers, numbers: range) -> None:
        for number in numbers:
            with_gradients(module, number)
            for parameter in module.parameters():
                assert parameter.grad is not None
                # As autograd does, in the memory format of the parameter.
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            optimizers.set_lr(0.5)
            step(optimizers)

    first, whole = module_like(saved_on_gpu), net()
    saved, expected = Optimizers(first, recipe, capturable=saved_on_gpu), Optimizers(whole, recipe)
    run(first, saved, range(3))
    run(whole, expected, range(6))
    second = module_like(loaded_on_gpu)
    second.load_state_dict(first.state_dict())
    loaded = Optimizers(second, recipe, capturable=loaded_on_gpu)
    rates = [group["lr"] for optimizer in loaded.optimizers for group in optimizer.param_groups]
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    groups = [group for optimizer in loaded.optimizers for group in optimizer.param_groups]
    assert all(group["lr"] is rate for group, rate in zip(groups, rates, strict=True))
    assert all(isinstance(group["lr"], torch.Tensor) == loaded_on_gpu for group in groups)
    assert {group["capturable"] for group in groups if "capturable" in group} <= {loaded_on_gpu}
    run(second, loaded, range(3, 6))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_captured_step_reads_the_learning_rates_from_one_tensor() -> None:
    optimizers = Optimizers(net(), make_recipe(**MUON), capturable=True)
    groups = [group for optimizer in optimizers.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    assert len({rate.untyped_storage().data_ptr() for rate in rates}) == 1
    for factor in (0.5, 0.5, 0.125):
        optimizers.set_lr(factor)
        assert [float(rate) for rate in rates] == pytest.approx([factor * peak for peak in (0.25, 0.6, 0.05)])
    assert all(group["lr"] is rate for group, rate in zip(groups, rates, strict=True))


def test_the_state_of_another_optimizer_is_rejected() -> None:
    state = Optimizers(net(), make_recipe()).state_dict()
    with pytest.raises((KeyError, ValueError)):
        Optimizers(net(), make_recipe(**MUON)).load_state_dict(state)


# --- the learning rate schedule


def lr_factors(recipe: Recipe, total_steps: int) -> list[float]:
    return [lr_factor(recipe, step, total_steps) for step in range(total_steps)]


@given(schedule=schedules, warmup_fraction=fractions, total_steps=st.integers(1, 400))
def test_every_learning_rate_is_positive_and_at_most_the_peak(
    schedule: str, warmup_fraction: float, total_steps: int
) -> None:
    recipe = make_recipe(schedule=schedule, warmup_fraction=warmup_fraction)
    assert all(0 < factor <= 1 for factor in lr_factors(recipe, total_steps))


@given(schedule=schedules, warmup_fraction=fractions, total_steps=st.integers(1, 10**7))
def test_the_last_learning_rate_of_a_long_run_is_positive(
    schedule: str, warmup_fraction: float, total_steps: int
) -> None:
    recipe = make_recipe(schedule=schedule, warmup_fraction=warmup_fraction)
    assert 0 < lr_factor(recipe, total_steps - 1, total_steps) <= 1


@given(schedule=schedules, warmup_fraction=fractions, total_steps=st.integers(2, 400))
def test_the_learning_rate_rises_and_then_never_rises_again(
    schedule: str, warmup_fraction: float, total_steps: int
) -> None:
    rising = round(warmup_fraction * total_steps)
    values = lr_factors(make_recipe(schedule=schedule, warmup_fraction=warmup_fraction), total_steps)
    assert all(before < after for before, after in pairwise(values[:rising]))
    falling = values[rising:]
    if schedule == "constant":
        assert set(falling) <= {1.0}
    else:
        assert all(before > after for before, after in pairwise(falling))
    assert max(values) == 1.0  # reached by the last step of the warm-up or the first step after it


@given(total_steps=st.integers(1, 400))
def test_a_constant_schedule_without_warmup_stays_at_the_peak(total_steps: int) -> None:
    assert lr_factors(make_recipe(), total_steps) == [1.0] * total_steps


def test_a_linear_schedule_decays_in_equal_steps() -> None:
    assert lr_factors(make_recipe(schedule="linear"), 4) == [1.0, 0.75, 0.5, 0.25]


def test_a_cosine_schedule_is_half_a_cosine() -> None:
    expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert lr_factors(make_recipe(schedule="cosine"), 8) == pytest.approx(expected)
    assert expected[4] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_warmup_is_linear_over_its_fraction_of_the_steps(schedule: str) -> None:
    values = lr_factors(make_recipe(schedule=schedule, warmup_fraction=0.4), 10)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:] == lr_factors(make_recipe(schedule=schedule), 6)
