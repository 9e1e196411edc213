"""The processes that train together. PyTorch's own engine starts and joins them: torchrun, DDP, NCCL or Gloo."""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cifarx_serve.errors import PeerLost, UsageError

# How Gloo and NCCL tell, in plain RuntimeErrors, that a process or the way to it is gone.
_OF_A_PEER = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)

_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Distributed(NamedTuple):
    """This process among those that train together.

    Attributes:
        rank: its number, from 0; rank 0 alone writes and logs.
        size: how many there are.
        local: its number on this machine.
        local_size: how many there are on this machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes and logs."""
        return self.rank == 0

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's part of a global batch, equal but for one image.

        A batch that does not give each rank two images goes to all of them whole: BatchNorm cannot train on one.
        """
        return batch[self.rank :: self.size] if self._shares(len(batch)) else batch

    def shared(self, count: int) -> int:
        """How many images of a global batch of `count` the ranks train on, together."""
        return count if self._shares(count) else count * self.size

    def _shares(self, count: int) -> bool:
        return count >= 2 * self.size

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the ranks."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def align(self, module: nn.Module) -> None:
        """Give every rank the first one's buffers: each has seen running statistics of its own images alone."""
        if self.size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, src=0)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; the same answer on every rank. The hosts speak, no GPU waits."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(int(flag))))

    def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        """A CPU tensor of one shape from every rank, in their order."""
        if self.size == 1:
            return [value]
        everyone = [torch.empty_like(value) for _ in range(self.size)]
        distributed.all_gather(everyone, value)
        return everyone

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first rank of each machine runs the block before the others: what it caches they find."""
        if self.local:
            self.meet()
        yield
        if not self.local:
            self.meet()

    def meet(self) -> None:
        """Wait for all the others."""
        self.total(torch.zeros(1))


@contextmanager
def init_distributed() -> Iterator[Distributed]:
    """Join the other processes that torchrun started, and leave them at the end; alone without torchrun.

    Raises:
        UsageError: the environment is torchrun's in part only.
    """
    given = [name for name in _ENVIRONMENT if name in os.environ]
    if len(given) < len(_ENVIRONMENT):
        if "RANK" in given and "WORLD_SIZE" in given:
            raise UsageError(f"the environment has {', '.join(given)} alone", "start several processes with torchrun")
        yield Distributed()
        return
    ranks = Distributed(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    if ranks.size == 1:
        yield ranks
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ranks
        ranks.meet()  # the first rank holds what the others speak through: nobody leaves before all have finished
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or _OF_A_PEER.search(str(error)):
            raise PeerLost(
                f"process {ranks.rank} of {ranks.size} lost another ({str(error).partition(chr(10))[0][-200:]})",
                "see what that one said; --resume auto goes on from the last checkpoint",
            ) from error
        raise
    finally:
        # A DistributedDataParallel that still lives keeps the group's threads past the end of Python, where PyTorch
        # 2.15 sometimes aborts ("terminate called without an active exception").
        gc.collect()
        distributed.destroy_process_group()
