"""The two half-precision types: float16, of few magnitudes, and bfloat16, of few digits."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from cifarx_serve.spec import Precision


class HalfType(NamedTuple):
    """A floating-point type of 16 bits.

    Attributes:
        name: its name in numpy and PyTorch.
        largest: its largest finite value.
        rounding: the largest relative error of rounding to it: half a unit in the last place.
    """

    name: str
    largest: float
    rounding: float


FLOAT16: Final = HalfType("float16", 65504.0, 2.0**-11)
"""IEEE 754 binary16."""

BFLOAT16: Final = HalfType("bfloat16", float.fromhex("0x1.fep127"), 2.0**-8)
"""The upper half of a float32: its range, with 8 significant bits."""

HALF_TYPES: Final[Mapping[Precision, HalfType]] = MappingProxyType({"fp16": FLOAT16, "bf16": BFLOAT16})
