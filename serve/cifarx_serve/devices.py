"""The devices that a model can run on, by the names that users write, and the error for one without memory."""

import re
from typing import Literal

import msgspec

from cifarx_serve.errors import DeviceMemoryError, UsageError

_DEVICES = "auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N, mps, gpu, npu"


class Device(msgspec.Struct, frozen=True):
    """A requested device.

    Attributes:
        type: the type of device. `auto` selects the best one that is available. `gpu` and `npu` are those of Intel, as
            OpenVINO calls them.
        index: the number of the GPU, for CUDA and TensorRT.
    """

    type: Literal["auto", "cpu", "cuda", "tensorrt", "mps", "gpu", "npu"]
    index: int = 0

    def __str__(self) -> str:
        return f"{self.type}:{self.index}" if self.type in ("cuda", "tensorrt") else self.type


def parse_device(name: str) -> Device:
    """Parse the name of a device: `auto`, `cpu`, `cuda`, `cuda:N`, `tensorrt`, `tensorrt:N`, `mps`, `gpu` or
    `npu`.

    Raises:
        UsageError: the name is not one of these.
    """
    match name:
        case "auto" | "cpu" | "mps" | "cuda" | "tensorrt" | "gpu" | "npu":
            return Device(name)
    if match_ := re.fullmatch(r"cuda:([0-9]{1,3})", name):
        return Device("cuda", int(match_[1]))
    if match_ := re.fullmatch(r"tensorrt:([0-9]{1,3})", name):
        return Device("tensorrt", int(match_[1]))
    raise UsageError(f"unknown device {name!r}", f"choose from {_DEVICES}")


def out_of_memory_error(
    device: str,
    batch_size: int | None = None,
    requested: int | None = None,
    free: int | None = None,
    option: str = "batch size",
) -> DeviceMemoryError:
    """Return the error for an allocation that failed on a device.

    Args:
        device: the name of the device.
        batch_size: the number of images in the batch, or None if memory ran out before there was one.
        requested: the size of the allocation in bytes, if it is known.
        free: the free memory of the device in bytes, if it is known.
        option: what sets the batch size.
    """
    figures = ((requested, "requested"), (free, "free"))
    sizes = ", ".join(f"{_format_bytes(size)} {name}" for size, name in figures if size is not None)
    problem = f"{device} is out of memory ({sizes})" if sizes else f"{device} is out of memory"
    if batch_size is None:
        return DeviceMemoryError(problem, "end other programs that use its memory, or use another --device")
    if batch_size == 1:
        return DeviceMemoryError(f"{problem} with a batch of one image", "use another --device")
    return DeviceMemoryError(f"{problem} with a batch of {batch_size:,} images", f"use a smaller {option}")


def _format_bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
