"""A random number generator whose output is bit-for-bit the same on every machine and with every NumPy version."""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int16Array: TypeAlias = NDArray[np.int16]
Float64Array: TypeAlias = NDArray[np.float64]


class PortableGenerator:
    """Random numbers computed from the raw output of PCG64.

    NumPy guarantees that the raw stream of a bit generator never changes. It gives no such guarantee for the
    distributions of `numpy.random.Generator`, so they are computed here.

    Args:
        seed: the seed of PCG64.
    """

    def __init__(self, seed: int) -> None:
        self._bit_generator = np.random.PCG64(seed)

    def random_raw(self, count: int) -> NDArray[np.uint64]:
        """Return `count` raw 64-bit words, uint64 (count,)."""
        return np.asarray(self._bit_generator.random_raw(count), dtype=np.uint64)

    def uniform(self, low: float, high: float, *shape: int) -> Float64Array:
        """Return uniform numbers in [low, high), float64 of the given shape."""
        # 53 bits fit into the significand of a float64, so the conversion and the scaling by a power of two are exact.
        unit = (self.random_raw(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (low + (high - low) * unit).reshape(shape)

    def signs(self, *shape: int) -> Float64Array:
        """Return -1.0 or 1.0 with equal probability, float64 of the given shape."""
        return np.where(self.random_raw(math.prod(shape)) >> np.uint64(63) == 0, -1.0, 1.0).reshape(shape)

    def noise(self, *shape: int) -> Int16Array:
        """Return triangular noise in [-15, 15], int16 of the given shape, whose size must be divisible by 8."""
        # "<u8" fixes the byte order of a word on every machine.
        data = self.random_raw(math.prod(shape) // 8).astype("<u8").view(np.uint8)
        return ((data & 15).astype(np.int16) + (data >> 4) - 15).reshape(shape)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """Return a random permutation of `range(count)`, int64 (count,)."""
        return np.argsort(self.random_raw(count), kind="stable").astype(np.int64)
