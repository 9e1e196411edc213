import pytest
import torch

from cifarx_train.checkpoints.rng_state import random_states, set_random_states
from cifarx_train.distributed import Distributed

CPU = torch.device("cpu")


def test_what_is_drawn_goes_on() -> None:
    torch.manual_seed(3)
    torch.rand(5)
    states = random_states(CPU, Distributed())
    expected = (torch.rand(4), torch.randint(0, 9, (4,)))
    torch.manual_seed(99)
    set_random_states(states, CPU, Distributed())
    assert torch.equal(torch.rand(4), expected[0])
    assert torch.equal(torch.randint(0, 9, (4,)), expected[1])


def test_a_state_is_a_copy() -> None:
    states = random_states(CPU, Distributed())
    before = states["cpu"][0].clone()
    torch.rand(1000)
    assert torch.equal(states["cpu"][0], before)
    assert not torch.equal(torch.get_rng_state(), before)


def test_every_rank_takes_its_own() -> None:
    torch.manual_seed(1)
    one = torch.get_rng_state()
    torch.manual_seed(2)
    other = torch.get_rng_state()
    set_random_states({"cpu": [one, other]}, CPU, Distributed(rank=1, size=2, local=1, local_size=2))
    assert torch.equal(torch.get_rng_state(), other)
    set_random_states({"cpu": [one, other]}, CPU, Distributed())
    assert torch.equal(torch.get_rng_state(), one)


@pytest.mark.parametrize("states", [{"cpu": []}, {"cpu": [torch.get_rng_state()]}])
def test_a_rank_that_was_not_there_keeps_its_own_seed(states: dict[str, list[torch.Tensor]]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    set_random_states(states, CPU, Distributed(rank=1, size=2, local=1, local_size=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_they_can_be_saved_without_code(tmp_path: object) -> None:
    states = random_states(CPU, Distributed())
    torch.save(states, f"{tmp_path}/states.pt")
    set_random_states(torch.load(f"{tmp_path}/states.pt", weights_only=True), CPU, Distributed())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
def test_a_gpu_goes_on_too() -> None:
    device = torch.device("cuda")
    states = random_states(device, Distributed())
    expected = torch.rand(4, device=device)
    set_random_states(states, device, Distributed())
    assert torch.equal(torch.rand(4, device=device), expected)
