"""The memory of a training device."""

import torch

from cifarx_serve.system.memory import peak_process_memory


def free_device_memory(device: torch.device) -> int | None:
    """Return the free memory of a GPU in bytes, or None for the CPU."""
    match device.type:
        case "cuda":
            return torch.cuda.mem_get_info(device)[0]
        case "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def peak_device_memory(device: torch.device) -> int:
    """Return the peak memory of the tensors on a CUDA device, or of this process for other devices, in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_process_memory()
