import copy
from typing import Any

import pytest
import torch
from torch import nn

from cifarx_train.optim.muon import Muon
from cifarx_train.optim.optimizers import Optimizers
from cifarx_train.recipes import Recipe, recipe

MUON = {"optimizer": "muon", "bias_lr": 0.05, "head_lr": 0.6, "momentum": 0.6, "nesterov": True}
KINDS: dict[str, dict[str, Any]] = {
    "plain sgd": {},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "muon": MUON,
}


def plan(**values: Any) -> Recipe:
    return recipe("notes", overrides={"learning_rate": 0.25, **values})


def net() -> nn.Sequential:
    """Two convolutions, a norm, a hidden linear layer and the head."""
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
    """Random gradients, or with None all of them zero."""
    source = torch.Generator().manual_seed(seed or 0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=source)
        parameter.grad = noise if seed is not None else torch.zeros_like(parameter)
    return module


def step(optimizers: Optimizers) -> None:
    for member in optimizers.members:
        member.step()


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moves(module: nn.Module, chosen: Recipe, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """By how much each parameter moves in one step of the optimizers."""
    before, optimizers = copies(module), Optimizers(module, chosen)
    optimizers.set_rate(factor)
    step(optimizers)
    return {name: parameter - before[name] for name, parameter in copies(module).items()}


def test_plain_sgd_steps_along_the_gradient() -> None:
    module = with_gradients(net())
    expected = {name: -0.25 * value.grad for name, value in module.named_parameters() if value.grad is not None}
    for name, moved in moves(module, plan()).items():
        assert torch.allclose(moved, expected[name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_only_weights_decay(kind: str) -> None:
    module = with_gradients(net(), None)
    before = copies(module)
    for name, moved in moves(module, plan(**KINDS[kind])).items():
        # Nesterov's momentum looks ahead from the first step on.
        rate = 0.25 * 0.01 * (1.9 if kind == "sgd" else 1.0)
        decay = -rate * before[name] if before[name].ndim > 1 else torch.zeros_like(moved)
        assert torch.allclose(moved, decay, atol=1e-7), name


def test_with_muon_biases_and_norms_do_not_decay_either() -> None:
    module = with_gradients(net(), None)
    with torch.no_grad():
        module[0].bias.fill_(1.0)
    moved = moves(module, plan(**MUON, weight_decay=0.01))
    assert {name for name, move in moved.items() if move.ndim < 2 and move.any()} == set()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_rate_is_a_share_of_every_group_s_peak(kind: str) -> None:
    optimizers = Optimizers(net(), plan(**KINDS[kind]))
    groups = [group for member in optimizers.members for group in member.param_groups]
    peaks = {float(group["lr"]) for group in groups}
    assert peaks == ({0.25, 0.05, 0.6} if kind == "muon" else {0.25})
    for factor in (0.5, 1.0, 0.125):
        optimizers.set_rate(factor)
        assert {float(group["lr"]) for group in groups} == {peak * factor for peak in peaks}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_rate_of_zero_moves_nothing(kind: str) -> None:
    module = with_gradients(net())
    for name, moved in moves(module, plan(**KINDS[kind]), factor=0.0).items():
        if kind == "muon" and moved.ndim > 1 and name != "5.weight":
            continue  # filters are brought to their norm in every step
        assert not moved.any(), name


def test_muon_takes_the_filters_and_sgd_the_rest() -> None:
    module = net()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizers = Optimizers(module, plan(**MUON))
    rates = {
        names[id(parameter)]: (type(member), group["lr"])
        for member in optimizers.members
        for group in member.param_groups
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


def test_muon_trains_a_network_without_any_bias() -> None:
    module = with_gradients(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False)))
    assert all(moved.any() for moved in moves(module, plan(**MUON)).values())


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_frozen_stays(kind: str) -> None:
    module = net()
    module[1].weight.requires_grad_(False)
    module[2].weight.requires_grad_(False)
    for name, moved in moves(with_gradients(module), plan(**KINDS[kind])).items():
        assert moved.any() == (name not in ("1.weight", "2.weight")), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_forgotten(kind: str) -> None:
    module = with_gradients(net())
    Optimizers(module, plan(**KINDS[kind])).zero_grad()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_state_goes_round(kind: str) -> None:
    chosen = plan(**KINDS[kind])
    whole = net()
    optimizers = Optimizers(whole, chosen)
    for number in range(3):
        with_gradients(whole, number)
        step(optimizers)
    half, state = copy.deepcopy(whole), copy.deepcopy(optimizers.state_dict())
    again = Optimizers(half, chosen)
    again.load_state_dict(state)
    for number in range(3, 6):
        for module, own in ((whole, optimizers), (half, again)):
            with_gradients(module, number)
            own.set_rate(0.5)
            step(own)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, half.state_dict()[name]), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_state_is_plain_and_can_be_saved(kind: str, tmp_path: Any) -> None:
    module = with_gradients(net())
    optimizers = Optimizers(module, plan(**KINDS[kind]))
    step(optimizers)
    torch.save(optimizers.state_dict(), tmp_path / "state.pt")
    Optimizers(net(), plan(**KINDS[kind])).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_rates_are_the_recipe_s_also_after_a_state_was_taken_up() -> None:
    first = Optimizers(net(), plan())
    first.set_rate(0.1)
    second = Optimizers(net(), plan(learning_rate=0.5))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.set_rate(0.5)
    assert [float(group["lr"]) for member in second.members for group in member.param_groups] == [0.25, 0.25]


def test_the_state_of_another_optimizer_is_refused() -> None:
    state = Optimizers(net(), plan()).state_dict()
    with pytest.raises((KeyError, ValueError)):
        Optimizers(net(), plan(**MUON)).load_state_dict(state)
