"""Where a split's images stay while a network trains on them."""

import warnings
from typing import Final, TypeAlias

import torch

from cifarx_serve.errors import FallbackWarning
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceImages
from cifarx_train.data.loaders.streaming import StreamedImages

PlacedImages: TypeAlias = DeviceImages | StreamedImages

_SHARE: Final = 0.5  # of the device's free memory; the network, its gradients and activations need the rest


def place_images(data: LabeledImages, device: torch.device) -> PlacedImages:
    """Put a split on the device, or stream it there, with a FallbackWarning, if it takes over half of the free memory.

    On a CPU nothing is copied: images in memory stay where they are, and mapped ones are read as they are needed.
    """
    free = free_memory(device)
    if free is None or data.images.nbytes <= _SHARE * free:
        return DeviceImages(data, device)
    warnings.warn(
        f"the images take {data.images.nbytes:,} bytes, more than half of the {free:,} that are free on {device}: "
        "they are streamed there in every epoch",
        FallbackWarning,
        stacklevel=2,
    )
    return StreamedImages(data, device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None on the CPU, where images already are."""
    match device.type:
        case "cuda":
            return torch.cuda.mem_get_info(device)[0]
        case "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None
