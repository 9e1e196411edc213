"""The memory that a run takes."""

import torch

from cifarx_serve.system.peak_memory import peak_memory as peak_memory_of_process


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, of this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_of_process()
