"""The devices that a model can run on, by the names that users write."""

import re
from typing import Literal

import msgspec

from cifarx_serve.errors import UsageError

_DEVICES = "auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N, mps"


class Device(msgspec.Struct, frozen=True):
    """A requested device.

    Attributes:
        type: the type of device. `auto` selects the best one that is available.
        index: the number of the GPU, for CUDA and TensorRT.
    """

    type: Literal["auto", "cpu", "cuda", "tensorrt", "mps"]
    index: int = 0

    def __str__(self) -> str:
        return f"{self.type}:{self.index}" if self.type in ("cuda", "tensorrt") else self.type


def parse_device(name: str) -> Device:
    """Parse the name of a device: `auto`, `cpu`, `cuda`, `cuda:N`, `tensorrt`, `tensorrt:N` or `mps`.

    Raises:
        UsageError: the name is not one of these.
    """
    match name:
        case "auto" | "cpu" | "mps" | "cuda" | "tensorrt":
            return Device(name)
    if match_ := re.fullmatch(r"cuda:([0-9]{1,3})", name):
        return Device("cuda", int(match_[1]))
    if match_ := re.fullmatch(r"tensorrt:([0-9]{1,3})", name):
        return Device("tensorrt", int(match_[1]))
    raise UsageError(f"unknown device {name!r}", f"choose from {_DEVICES}")
