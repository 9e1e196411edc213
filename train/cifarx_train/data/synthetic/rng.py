"""Random numbers that are the same, bit for bit, on every machine and with every numpy."""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Shorts: TypeAlias = NDArray[np.int16]
Floats: TypeAlias = NDArray[np.float64]


class Source:
    """Random numbers made by hand from PCG64's raw stream."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def raw(self, count: int) -> NDArray[np.uint64]:
        """``count`` raw 64-bit words, uint64 (count,)."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)

    def uniform(self, low: float, high: float, *shape: int) -> Floats:
        """Uniform numbers in [low, high), float64 of ``shape``."""
        # 53 bits fit a float64's significand, so the conversion and the scaling by a power of two are exact.
        unit = (self.raw(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (low + (high - low) * unit).reshape(shape)

    def sign(self, *shape: int) -> Floats:
        """-1.0 or 1.0 by lot, float64 of ``shape``."""
        return np.where(self.raw(math.prod(shape)) >> np.uint64(63) == 0, -1.0, 1.0).reshape(shape)

    def grain(self, *shape: int) -> Shorts:
        """Triangular noise in [-15, 15], int16 of ``shape``, whose size must divide by eight."""
        # "<u8" fixes the order of the bytes inside a word, whatever the machine's own is.
        data = self.raw(math.prod(shape) // 8).astype("<u8").view(np.uint8)
        return ((data & 15).astype(np.int16) + (data >> 4) - 15).reshape(shape)

    def order(self, count: int) -> NDArray[np.int64]:
        """A random permutation of range(count), int64 (count,)."""
        return np.argsort(self.raw(count), kind="stable").astype(np.int64)
