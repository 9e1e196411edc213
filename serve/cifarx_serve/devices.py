"""The names of devices, as users write them."""

import re
from typing import Literal, NamedTuple

from cifarx_serve.errors import UsageError

DEVICES = "auto, cpu, cuda, cuda:N, mps"


class Device(NamedTuple):
    """A device as asked for; `number` is meaningful for CUDA alone."""

    kind: Literal["auto", "cpu", "cuda", "mps"]
    number: int = 0

    def __str__(self) -> str:
        return f"cuda:{self.number}" if self.kind == "cuda" else self.kind


def parse_device(name: str) -> Device:
    """Read `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UsageError: it is none of these.
    """
    match name:
        case "auto" | "cpu" | "mps" | "cuda":
            return Device(name)
    if match_ := re.fullmatch(r"cuda:([0-9]{1,3})", name):
        return Device("cuda", int(match_[1]))
    raise UsageError(f"unknown device {name!r}", f"use one of {DEVICES}")
