"""Select a loader by the memory that is free on the training device."""

import warnings
from typing import Final

import torch

from cifarx_serve.errors import FallbackWarning
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.base import Loader
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.loaders.streaming import StreamingLoader
from cifarx_train.device_memory import free_device_memory

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
