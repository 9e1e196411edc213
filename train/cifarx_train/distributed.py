"""Training with several processes, which torchrun starts. Uses PyTorch's DDP over NCCL or Gloo."""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cifarx_serve.errors import DistributedError, UsageError, error_message

# Gloo and NCCL report a lost process or connection as a plain RuntimeError with one of these words.
_CONNECTION_ERROR = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)

_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Distributed(NamedTuple):
    """The position of this process among the processes that train together, and their collective operations.

    Attributes:
        rank: the number of this process, from 0. Only rank 0 writes files and logs.
        world_size: the number of processes.
        local_rank: the number of this process on its machine, from 0.
        local_world_size: the number of processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def shard(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a global batch. The sizes of the parts differ by at most one image.

        Every rank receives the whole batch if there are fewer than two images per rank, because BatchNorm cannot train
        on a single image.
        """
        return batch[self.rank :: self.world_size] if self._can_shard(len(batch)) else batch

    def total_images(self, batch_size: int) -> int:
        """Return the number of images that all ranks together train on for a global batch of `batch_size`."""
        return batch_size if self._can_shard(batch_size) else batch_size * self.world_size

    def _can_shard(self, batch_size: int) -> bool:
        return batch_size >= 2 * self.world_size

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """Wrap a model in `DistributedDataParallel`, which averages the gradients over the ranks."""
        return module if self.world_size == 1 else DistributedDataParallel(module)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Copy the buffers of rank 0 to all ranks. The running statistics of each rank cover only its own images."""
        if self.world_size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, src=0)

    def broadcast_state(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of rank 0 to all ranks."""
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                contiguous = tensor.contiguous()
                distributed.broadcast(contiguous, src=0)
                tensor.copy_(contiguous)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks in place, and return it."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank. Runs on the CPU and does not synchronize with the GPU."""
        return flag if self.world_size == 1 else bool(self.all_reduce(torch.tensor(int(flag))))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the CPU tensors of all ranks in rank order. All of them must have the same shape."""
        if self.world_size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(gathered, tensor)
        return gathered

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on the first rank of each machine before the others, which then find what it cached."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        self.all_reduce(torch.zeros(1))


@contextmanager
def init_distributed() -> Iterator[Distributed]:
    """Initialize the process group from torchrun's environment and destroy it at the end.

    Without torchrun there is a single process and no process group.

    Raises:
        UsageError: only some of torchrun's environment variables are set.
        DistributedError: another process exited or cannot be reached.
    """
    present = [name for name in _TORCHRUN_VARIABLES if name in os.environ]
    if len(present) < len(_TORCHRUN_VARIABLES):
        if "RANK" in present and "WORLD_SIZE" in present:
            raise UsageError(
                f"only {', '.join(present)} of torchrun's environment variables are set",
                "start several processes with torchrun",
            )
        yield Distributed()
        return
    rank, local_rank, world_size, local_world_size = (int(os.environ[name]) for name in _TORCHRUN_VARIABLES)
    process = Distributed(rank, world_size, local_rank, local_world_size)
    if world_size == 1:
        yield process
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield process
        process.barrier()  # rank 0 hosts the store that the others use, so it must not exit before they finish
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or _CONNECTION_ERROR.search(str(error)):
            raise DistributedError(
                f"rank {rank} of {world_size} lost the connection to another rank ({error_message(error)[-200:]})",
                "see the error of that rank; --resume auto continues from the last checkpoint",
            ) from error
        raise
    finally:
        # A DistributedDataParallel that is still alive keeps the threads of the process group running past the end of
        # Python, where PyTorch 2.15 sometimes aborts ("terminate called without an active exception").
        gc.collect()
        distributed.destroy_process_group()
