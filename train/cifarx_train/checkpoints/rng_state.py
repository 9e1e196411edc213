"""The state of PyTorch's default generators, which augmentation and dropout draw from."""

from collections.abc import Mapping

import torch

from cifarx_train.distributed import Distributed


def random_states(device: torch.device, ranks: Distributed) -> dict[str, list[torch.Tensor]]:
    """The generators of the CPU and of the device, one state a rank."""
    states = {"cpu": ranks.gather(torch.get_rng_state())}
    if device.type == "cuda":
        states["cuda"] = ranks.gather(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: Mapping[str, list[torch.Tensor]], device: torch.device, ranks: Distributed) -> None:
    """Continue this rank's generators; a rank or a device that was not there keeps its own seed."""
    if ranks.rank < len(states["cpu"]):
        torch.set_rng_state(states["cpu"][ranks.rank])
    if device.type == "cuda" and ranks.rank < len(states.get("cuda", ())):
        torch.cuda.set_rng_state(states["cuda"][ranks.rank], device)
