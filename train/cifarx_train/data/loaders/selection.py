"""Select a loader by the memory that is free on the training device."""

import warnings
from typing import Final, TypeAlias

import torch

from cifarx_serve.errors import FallbackWarning
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.loaders.streaming import StreamingLoader

Loader: TypeAlias = DeviceLoader | StreamingLoader

_MAX_FRACTION: Final = 0.5  # of the free memory; the rest is for the network, its gradients and activations


def select_loader(data: LabeledImages, device: torch.device) -> Loader:
    """Return a `DeviceLoader`, or a `StreamingLoader` if the images need more than half of the free device memory.

    Streaming is reported by a FallbackWarning. On a CPU the images are never copied: those in memory are used as they
    are, and memory-mapped ones are read when they are needed.
    """
    free = free_device_memory(device)
    if free is None or data.images.nbytes <= _MAX_FRACTION * free:
        return DeviceLoader(data, device)
    warnings.warn(
        f"the images need {data.images.nbytes:,} bytes, more than half of the {free:,} free bytes on {device}: "
        "they are streamed to it in every epoch",
        FallbackWarning,
        stacklevel=2,
    )
    return StreamingLoader(data, device)


def free_device_memory(device: torch.device) -> int | None:
    """Return the number of bytes that can be allocated on a device, or None for a CPU."""
    match device.type:
        case "cuda":
            return torch.cuda.mem_get_info(device)[0]
        case "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None
