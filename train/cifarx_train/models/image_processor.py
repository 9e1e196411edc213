"""Describe an image processor of Hugging Face's transformers as an `InputSpec`."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import SpecError
from cifarx_serve.spec import InputSpec, Interpolation
from cifarx_train.models.preprocessing_check import require_same_preprocessing

_INTERPOLATIONS: Final[dict[int, Interpolation]] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_CONVNEXT_STRETCH_SIZE: Final = 384  # from this size on, ConvNeXT's processor resizes without a crop
_LEVIT_RATIO: Final = 256 / 224
_CROP_OFFSET: Final = {"crop_offset": "floor"}
_REMEDY: Final = "state the nearest preprocessing with --spec"


def processor_input(processor: Any) -> InputSpec:
    """Return the preprocessing of an image processor.

    The attributes of the processor say what it does, and running it on two images shows whether that is all.

    Raises:
        SpecError: a spec cannot describe it.
    """
    name = type(processor).__name__
    if data_config := getattr(processor, "data_config", None):
        from cifarx_train.models.timm_networks import timm_input

        return timm_input(data_config)
    if not processor.do_resize:
        raise SpecError(f"{name} does not resize images", _REMEDY)
    if int(processor.resample) not in _INTERPOLATIONS:
        raise SpecError(f"{name} resizes with Pillow's filter {processor.resample}", _REMEDY)
    mean, std = _normalization(processor)
    spec = InputSpec(
        **_resize_fields(processor, name),
        color="BGR" if getattr(processor, "do_flip_channel_order", False) else "RGB",
        value_range=_value_range(processor),
        mean=mean,
        std=std,
        interpolation=_INTERPOLATIONS[int(processor.resample)],
    )

    def preprocess(image: Image.Image) -> NDArray[np.float32]:
        return np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0], np.float32)

    return require_same_preprocessing(spec, preprocess, name)


def _resize_fields(processor: Any, name: str) -> dict[str, Any]:
    """Return the fields of the spec that say how a processor resizes and crops.

    Raises:
        SpecError: its results do not all have the same size.
    """
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    if size.keys() == {"height", "width"}:
        resized = (size["height"], size["width"])
        height, width = (crop["height"], crop["width"]) if crop else resized
        if (height, width) == resized:
            return {"height": height, "width": width}
        return {"height": height, "width": width, "resize_to": resized, **_CROP_OFFSET}
    if size.keys() != {"shortest_edge"}:
        raise SpecError(f"{name} resizes images to {size}", _REMEDY)
    edge, crop_pct = size["shortest_edge"], getattr(processor, "crop_pct", None)
    if name.startswith("ConvNext"):
        if edge >= _CONVNEXT_STRETCH_SIZE:
            return {"height": edge, "width": edge}
        crop = {"height": edge, "width": edge}
    if crop is None:
        raise SpecError(f"{name} keeps the aspect ratio of images, so that their sizes differ", _REMEDY)
    if name.startswith("Levit"):
        edge = int(_LEVIT_RATIO * edge)
    elif crop_pct:
        edge = int(edge / crop_pct)
    size = {"height": crop["height"], "width": crop["width"]}
    return {**size, "resize": "shorter_side", "resize_to": edge, **_CROP_OFFSET}


def _value_range(processor: Any) -> tuple[float, float]:
    low = -1.0 if getattr(processor, "rescale_offset", False) else 0.0
    return low, low + (round(255 * processor.rescale_factor, 6) if processor.do_rescale else 255.0)


def _normalization(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation per channel, or nothing if the processor does not normalize."""
    if not processor.do_normalize:
        return (), ()
    mean, std = _per_channel(processor.image_mean), _per_channel(processor.image_std)
    if getattr(processor, "include_top", False):  # EfficientNet's processor divides by it twice
        std = tuple(value * value for value in std)
    return mean, std


def _per_channel(values: float | Sequence[float]) -> tuple[float, ...]:
    return (values,) * 3 if isinstance(values, int | float) else tuple(map(float, values))
