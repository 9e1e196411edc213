"""Describe torchvision's transforms as an `InputSpec`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode

from cifarx_serve.errors import SpecError, UsageError
from cifarx_serve.spec import InputSpec, Interpolation
from cifarx_train.models.preprocessing_check import require_same_preprocessing

_INTERPOLATIONS: Final[dict[str, Interpolation]] = {
    InterpolationMode.NEAREST.value: "nearest",
    InterpolationMode.NEAREST_EXACT.value: "nearest",
    InterpolationMode.BILINEAR.value: "bilinear",
    InterpolationMode.BICUBIC.value: "bicubic",
    InterpolationMode.LANCZOS.value: "lanczos",
}


class _Description:
    """What the transforms so far do to an image. Each method adds one transform and returns a problem with it, if any.

    Attributes:
        fields: fields of the `InputSpec`.
        is_tensor: whether the image is a tensor.
        is_float: whether the image is a tensor with values from 0 to 1.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.is_tensor = self.is_float = False

    def resize(self, transform: Any) -> str | None:
        size = _size(transform.size)
        if size is None or getattr(transform, "max_size", None) is not None:
            return "has a maximum size"
        if self.fields.keys() & {"height", "resize", "mean"}:
            return "comes after another resize, a crop or a normalization"
        interpolation = _filter(transform.interpolation)
        if interpolation not in _INTERPOLATIONS:
            return f"uses the filter {interpolation}"
        one_number = len(size) == 1
        self.fields |= {"resize": "shorter_side", "resize_to": size[0]} if one_number else {"resize_to": size}
        self.fields["resize"] = "shorter_side" if one_number else "stretch"
        self.fields["interpolation"] = _INTERPOLATIONS[interpolation]
        self.fields["antialias"] = not self.is_tensor or getattr(transform, "antialias", True) is not False
        return None

    def crop(self, transform: Any) -> str | None:
        if "height" in self.fields or "mean" in self.fields:
            return "comes after another crop or a normalization"
        if "resize" not in self.fields:
            return "comes before the images are resized"
        height, width = _size(transform.size, square=True) or (0, 0)
        self.fields |= {"height": height, "width": width}
        return None

    def grayscale(self, transform: Any) -> str | None:
        if transform.num_output_channels != 1:
            return "returns three equal channels"
        if self.fields or self.is_tensor:
            return "comes after another transform"
        self.fields |= {"channels": 1, "color": "L"}
        return None

    def to_float_tensor(self, _transform: Any) -> str | None:
        self.is_tensor = self.is_float = True
        return None

    def to_tensor(self, _transform: Any) -> str | None:
        self.is_tensor = True
        return None

    def to_float(self, transform: Any) -> str | None:
        dtype = transform.dtype
        if dtype is torch.uint8 and not self.is_float:
            return None
        if dtype is not torch.float32:
            return f"converts to {dtype}"
        if not getattr(transform, "scale", True):
            self.fields["value_range"] = (0.0, 255.0)
        self.is_float = True
        return None

    def normalize(self, transform: Any) -> str | None:
        if not self.is_float:
            return "comes before the images are floats"
        if "mean" in self.fields:
            return "comes after another normalization"
        mean, std = (tuple(map(float, values)) for values in (transform.mean, transform.std))
        self.fields |= {"mean": mean, "std": std}
        return None

    def ignore(self, _transform: Any) -> str | None:
        return None


_TRANSFORMS: Final[dict[str, Callable[[_Description, Any], str | None]]] = {
    "Resize": _Description.resize,
    "CenterCrop": _Description.crop,
    "Grayscale": _Description.grayscale,
    "ToTensor": _Description.to_float_tensor,
    "PILToTensor": _Description.to_tensor,
    "ToImage": _Description.to_tensor,
    "ToPureTensor": _Description.ignore,
    "ConvertImageDtype": _Description.to_float,
    "ToDtype": _Description.to_float,
    "Normalize": _Description.normalize,
    "RGB": _Description.ignore,
    "Identity": _Description.ignore,
}
"""The transforms that a spec can describe, by the name of their class."""


def transforms_input(transforms: Any, image_size: tuple[int, int] | None) -> InputSpec:
    """Return the preprocessing of transforms. See `Preprocessing.from_transforms`."""
    steps = list(_flatten(transforms))
    if len(steps) == 1 and type(steps[0]).__name__ == "ImageClassification":
        return _preset_input(steps[0])
    description = _Description()
    for step in steps:
        name = type(step).__name__
        add = _TRANSFORMS.get(name) if type(step).__module__.startswith("torchvision.") else None
        problem = add(description, step) if add else _problem(name)
        if problem:
            raise SpecError(
                f"a spec cannot describe the transform {name}, which {problem}",
                "give the transforms of evaluation without it, or preprocess inside the network",
            )
    if not description.is_float:
        raise SpecError("the transforms do not make a tensor of floats", "add ToTensor()")
    resized_before = image_size if "resize" not in description.fields else None
    spec = InputSpec(**_with_size(description.fields, image_size))
    return require_same_preprocessing(spec, _runner(steps, resized_before), "the transforms")


def _with_size(fields: dict[str, Any], image_size: tuple[int, int] | None) -> dict[str, Any]:
    if "height" in fields:
        return fields
    if "resize" not in fields:
        if image_size is None:
            raise UsageError(
                "the transforms do not resize the images, so that their size is unknown",
                "state it, as in from_transforms(transforms, image_size=32)",
            )
        return {**fields, "height": image_size[0], "width": image_size[1]}
    if fields["resize"] == "shorter_side":
        raise SpecError(
            f"Resize({fields['resize_to']}) keeps the aspect ratio of the images, so that their sizes differ",
            "add CenterCrop, or give Resize a height and a width",
        )
    height, width = fields["resize_to"]
    return {**fields, "height": height, "width": width, "resize_to": None}


def _runner(
    steps: Sequence[Any], resized_before: tuple[int, int] | None
) -> Callable[[Image.Image], NDArray[np.float32]]:
    """Return the function that runs the transforms on an image, which is first resized to (height, width) if given."""

    def run(image: Image.Image) -> NDArray[np.float32]:
        result: Any = image
        if resized_before:
            result = image.resize(resized_before[::-1], Image.Resampling.BILINEAR)
        for step in steps:
            result = step(result)
        pixels: NDArray[np.float32] = result.numpy()
        return pixels

    return run


def _preset_input(preset: Any) -> InputSpec:
    """Return the preprocessing of the `transforms()` of published weights."""
    height, width = _size(preset.crop_size, square=True) or (0, 0)
    resized = _size(preset.resize_size) or ()
    spec = InputSpec(
        height=height,
        width=width,
        mean=tuple(map(float, preset.mean)),
        std=tuple(map(float, preset.std)),
        resize="shorter_side" if len(resized) == 1 else "stretch",
        resize_to=resized[0] if len(resized) == 1 else resized,
        interpolation=_INTERPOLATIONS[_filter(preset.interpolation)],
    )

    def run(image: Image.Image) -> NDArray[np.float32]:
        pixels: NDArray[np.float32] = preset(image).numpy()
        return pixels

    return require_same_preprocessing(spec, run, "the transforms")


def _flatten(transforms: Any) -> Iterable[Any]:
    if isinstance(transforms, list | tuple | nn.Sequential):
        nested: Any = transforms
    elif type(transforms).__name__ == "Compose":
        nested = transforms.transforms
    else:
        return [transforms]
    return [step for part in nested for step in _flatten(part)]


def _filter(interpolation: Any) -> str:
    """Return the name of a filter that is given as torchvision's enum, as its name, or as Pillow's number."""
    if isinstance(interpolation, int):
        return Image.Resampling(interpolation).name.lower()
    return str(getattr(interpolation, "value", interpolation))


def _size(size: Any, *, square: bool = False) -> tuple[int, ...] | None:
    """Return a size as one number or (height, width)."""
    if size is None:
        return None
    numbers = (size,) if isinstance(size, int) else tuple(map(int, size))
    return (numbers[0], numbers[0]) if square and len(numbers) == 1 else numbers


def _problem(name: str) -> str:
    if name.startswith(("Random", "AutoAugment", "TrivialAugment", "AugMix", "ColorJitter")):
        return "is for training"
    return "is not among those for the evaluation of image classifiers"
