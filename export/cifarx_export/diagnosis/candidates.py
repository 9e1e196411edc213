"""The usual ways to preprocess images, as changes of what is known about the input of a network."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import Color, InputSpec, Interpolation
from cifarx_train.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

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


class Scaling(NamedTuple):
    """How pixel values become the values of the input.

    Attributes:
        name: a short name.
        value_range: what 0 and 255 are scaled to.
        mean, std: of red, green and blue, on that scale.
    """

    name: str
    value_range: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_NONE: Final = (0.0, 0.0, 0.0)
_ONE: Final = (1.0, 1.0, 1.0)

SCALINGS: Final = (
    Scaling("0 to 1", (0.0, 1.0), _NONE, _ONE),
    Scaling("ImageNet's mean and std", (0.0, 1.0), IMAGENET_MEAN, IMAGENET_STD),
    Scaling("-1 to 1", (0.0, 1.0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    Scaling("CIFAR-10's mean and std", (0.0, 1.0), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    Scaling("0 to 255", (0.0, 255.0), _NONE, _ONE),
    # The mean that Caffe subtracts, of ImageNet's images on the scale of 0 to 255.
    Scaling("0 to 255, less ImageNet's mean", (0.0, 255.0), (123.68, 116.779, 103.939), _ONE),
    Scaling(
        "CLIP's mean and std",
        (0.0, 1.0),
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
)
"""The usual scalings, the most usual first."""


def data_scaling(pixels: NDArray[np.uint8]) -> Scaling:
    """Return the scaling with the mean and standard deviation of the images themselves, uint8 (N, H, W, 3)."""
    values = pixels.reshape(-1, 3).astype(np.float64) / 255
    mean, std = (tuple(round(float(value), 4) for value in numbers) for numbers in (values.mean(0), values.std(0)))
    return Scaling("mean and std of the data", (0.0, 1.0), mean, tuple(max(value, 1e-3) for value in std))


def scaled(spec: InputSpec, scaling: Scaling, color: Color) -> InputSpec:
    """Return the input with a scaling and an order of the channels."""
    mean, std = scaling.mean, scaling.std
    if color == "BGR":
        mean, std = mean[::-1], std[::-1]
    if color == "L":
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return msgspec.structs.replace(spec, value_range=scaling.value_range, mean=mean, std=std, color=color)


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
