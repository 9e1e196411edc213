"""The usual ways in which pixel values become the values of a network's input."""

from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import Color, InputSpec
from cifarx_train.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD


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
