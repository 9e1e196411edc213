"""PyTorch's out-of-memory errors as `DeviceMemoryError`. This module imports PyTorch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from cifarx_serve.devices import out_of_memory_error

# CUDA raises torch.OutOfMemoryError. The CPU, MPS and the CUDA libraries raise a RuntimeError with one of these texts.
_OUT_OF_MEMORY: Final = re.compile(r"out of memory|can't allocate memory|_ALLOC_FAILED")
_REQUESTED: Final = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", re.IGNORECASE)
_FREE: Final = re.compile(r"of which ([\d.]+) (bytes|[KMG]iB) is free")
_UNITS: Final = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@contextmanager
def report_out_of_memory(
    device: torch.device, batch_size: int | None = None, option: str = "batch size"
) -> Iterator[None]:
    """Raise a `DeviceMemoryError` for an out-of-memory error within the block.

    Args:
        device: the device that the block uses.
        batch_size: the number of images in the batch, or None if the block does not run a batch.
        option: what sets the batch size, for the remedy.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(message):
            raise
        sizes = _parse_size(_REQUESTED, message), _parse_size(_FREE, message)
        raise out_of_memory_error(str(device), batch_size, *sizes, option) from error


def _parse_size(pattern: re.Pattern[str], message: str) -> int | None:
    match = pattern.search(message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None
