"""Save and restore the state of PyTorch's default random generators, which augmentation and dropout draw from."""

from collections.abc import Mapping

import torch

from cifarx_train.distributed import Distributed


def get_rng_states(device: torch.device, distributed: Distributed) -> dict[str, list[torch.Tensor]]:
    """Return the states of the generators of the CPU and the device, one per rank."""
    states = {"cpu": distributed.all_gather(torch.get_rng_state())}
    if device.type == "cuda":
        states["cuda"] = distributed.all_gather(torch.cuda.get_rng_state(device))
    return states


def set_rng_states(states: Mapping[str, list[torch.Tensor]], device: torch.device, distributed: Distributed) -> None:
    """Restore the generators of this rank. A rank or device without a saved state keeps its current state."""
    rank = distributed.rank
    if rank < len(states["cpu"]):
        torch.set_rng_state(states["cpu"][rank])
    if device.type == "cuda" and rank < len(states.get("cuda", ())):
        torch.cuda.set_rng_state(states["cuda"][rank], device)
