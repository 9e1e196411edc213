"""The names of devices, as users write them."""

import re
from typing import Literal, NamedTuple

from cifarx_serve.errors import UsageError

DEVICES = "auto, cpu, cuda, cuda:N, tensorrt, tensorrt:N, mps"


class Device(NamedTuple):
    """A device as asked for; `number` is meaningful for CUDA and TensorRT, which counts the same GPUs."""

    kind: Literal["auto", "cpu", "cuda", "tensorrt", "mps"]
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}" if self.kind in ("cuda", "tensorrt") else self.kind


def parse_device(name: str) -> Device:
    """Read `auto`, `cpu`, `cuda`, `cuda:N`, `tensorrt`, `tensorrt:N` or `mps`.

    Raises:
        UsageError: it is none of these.
    """
    match name:
        case "auto" | "cpu" | "mps" | "cuda" | "tensorrt":
            return Device(name)
    if match_ := re.fullmatch(r"cuda:([0-9]{1,3})", name):
        return Device("cuda", int(match_[1]))
    if match_ := re.fullmatch(r"tensorrt:([0-9]{1,3})", name):
        return Device("tensorrt", int(match_[1]))
    raise UsageError(f"unknown device {name!r}", f"use one of {DEVICES}")
