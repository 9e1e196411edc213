"""What a quantized network has gained over that in fp32."""

from typing import Final

from cifarx_export.parity.checks import Check

CHECK_NAME: Final = "int8 gain"

MIN_GAIN: Final = 0.05
"""The smallest gain: the share of the multiplications that run in int8, or of the bytes that are saved."""


def check_gain(share: float, before: int, after: int) -> Check:
    """Check that a quantized network runs a part of its multiplications in int8, or is smaller than the original.

    Args:
        share: the share of the multiplications that run in int8, from 0 to 1.
        before: bytes of the weights in fp32.
        after: bytes of the weights of the quantized network.
    """
    size = f"weights of {after / 1e6:.2f} MB instead of {before / 1e6:.2f} MB"
    found = f"{share:.0%} of the multiplications in int8, {size}"
    passed = share >= MIN_GAIN or after <= (1 - MIN_GAIN) * before
    return Check(CHECK_NAME, passed, found if passed else f"{found}: use --precision fp32 or fp16")
