import pytest
import torch

from cifarx_train.checkpoints.rng_state import get_rng_states, set_rng_states
from cifarx_train.distributed import Distributed

CPU = torch.device("cpu")


def test_random_numbers_continue_after_a_restore() -> None:
    torch.manual_seed(3)
    torch.rand(5)
    states = get_rng_states(CPU, Distributed())
    expected = (torch.rand(4), torch.randint(0, 9, (4,)))
    torch.manual_seed(99)
    set_rng_states(states, CPU, Distributed())
    assert torch.equal(torch.rand(4), expected[0])
    assert torch.equal(torch.randint(0, 9, (4,)), expected[1])


def test_the_state_is_a_copy() -> None:
    states = get_rng_states(CPU, Distributed())
    before = states["cpu"][0].clone()
    torch.rand(1000)
    assert torch.equal(states["cpu"][0], before)
    assert not torch.equal(torch.get_rng_state(), before)


def test_every_rank_restores_its_own_state() -> None:
    torch.manual_seed(1)
    one = torch.get_rng_state()
    torch.manual_seed(2)
    other = torch.get_rng_state()
    set_rng_states({"cpu": [one, other]}, CPU, Distributed(rank=1, world_size=2, local_rank=1, local_world_size=2))
    assert torch.equal(torch.get_rng_state(), other)
    set_rng_states({"cpu": [one, other]}, CPU, Distributed())
    assert torch.equal(torch.get_rng_state(), one)


@pytest.mark.parametrize("states", [{"cpu": []}, {"cpu": [torch.get_rng_state()]}])
def test_a_rank_without_a_saved_state_keeps_its_own(states: dict[str, list[torch.Tensor]]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    set_rng_states(states, CPU, Distributed(rank=1, world_size=2, local_rank=1, local_world_size=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_states_can_be_loaded_with_weights_only(tmp_path: object) -> None:
    states = get_rng_states(CPU, Distributed())
    torch.save(states, f"{tmp_path}/states.pt")
    set_rng_states(torch.load(f"{tmp_path}/states.pt", weights_only=True), CPU, Distributed())


@pytest.mark.gpu
def test_random_numbers_on_a_gpu_continue_after_a_restore() -> None:
    device = torch.device("cuda")
    states = get_rng_states(device, Distributed())
    expected = torch.rand(4, device=device)
    set_rng_states(states, device, Distributed())
    assert torch.equal(torch.rand(4, device=device), expected)
