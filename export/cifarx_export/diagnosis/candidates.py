"""The usual ways to preprocess images, as changes of what is known about the input of a network."""

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import numpy as np

from cifarx_export.parity.scalings import Scaling, scaled
from cifarx_serve.spec import Color, InputSpec, Interpolation

CROPS: Final = (0.875, 1.0, 0.95, 0.9)
"""The usual sizes of a center crop relative to the shorter side; 0.875 is that of torchvision, 224 of 256."""

FILTERS: Final[tuple[tuple[Interpolation, bool], ...]] = (
    ("bilinear", True),
    ("bicubic", True),
    ("lanczos", True),
    ("nearest", True),
    ("bilinear", False),
    ("bicubic", False),
)
"""The usual filters, and whether they are widened when an image is made smaller, as Pillow does and OpenCV does not."""


def geometries(spec: InputSpec) -> Iterator[InputSpec]:
    """Yield the usual ways to resize images to the size of an input, with the usual filter."""
    plain = msgspec.structs.replace(
        spec, resize="stretch", resize_to=None, interpolation="bilinear", antialias=True, fill=0
    )
    yield plain
    yield cropped(plain, CROPS[0])
    yield msgspec.structs.replace(plain, resize="letterbox")


def cropped(spec: InputSpec, crop: float) -> InputSpec:
    """Return the input with the shorter side resized, and a center crop of this part of it."""
    return msgspec.structs.replace(spec, resize="shorter_side", resize_to=round(min(spec.height, spec.width) / crop))


def refinements(spec: InputSpec) -> Iterator[InputSpec]:
    """Yield variants of an input that matter less: other filters, and for a crop other sizes before it."""
    for interpolation, antialias in FILTERS:
        yield msgspec.structs.replace(spec, interpolation=interpolation, antialias=antialias)
    if spec.resize == "shorter_side":
        for crop in CROPS:
            yield cropped(spec, crop)


def geometry(spec: InputSpec) -> InputSpec:
    """Return the part of an input that decides about its pixels, with the default scaling."""
    color: Color = "L" if spec.color == "L" else "RGB"
    return msgspec.structs.replace(spec, color=color, value_range=(0.0, 1.0), mean=(), std=(), layout="NCHW")


def scaling_name(spec: InputSpec, known: Sequence[Scaling]) -> str:
    """Return the name of the scaling of an input, or its numbers if it has none."""
    plain = geometry(spec)
    for scaling in known:
        if _same_scaling(scaled(plain, scaling, spec.color), spec):
            return scaling.name
    low, high = spec.value_range
    return f"{low:g} to {high:g}, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}"


def unit_scaling(spec: InputSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that have the same effect on values from 0 to 1."""
    low, high = spec.value_range
    span = high - low
    return tuple((mean - low) / span for mean in spec.mean), tuple(std / span for std in spec.std)


def _same_scaling(one: InputSpec, other: InputSpec) -> bool:
    pairs = zip(unit_scaling(one), unit_scaling(other), strict=True)
    return all(np.allclose(first, second, rtol=1e-3, atol=1e-4) for first, second in pairs)


def _numbers(values: tuple[float, ...]) -> str:
    shown = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:g}" for value in shown)
