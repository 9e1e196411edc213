from typing import Any

import pytest
import transformers

from cifarx_serve.errors import SpecError
from cifarx_serve.spec import InputSpec
from cifarx_train.models.image_processor import processor_input

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("processor", "spec"),
    [
        (
            transformers.ViTImageProcessor(size={"height": 48, "width": 64}),
            InputSpec(height=48, width=64, mean=HALF, std=HALF),
        ),
        (
            transformers.ViTImageProcessor(do_normalize=False, do_rescale=False),
            InputSpec(height=224, width=224, value_range=(0, 255)),
        ),
        (
            transformers.ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.95),
            InputSpec(
                height=224,
                width=224,
                mean=HALF,
                std=HALF,
                resize="shorter_side",
                resize_to=235,
                crop_offset="floor",
                interpolation="bicubic",
            ),
        ),
        (
            transformers.MobileViTImageProcessor(),
            InputSpec(
                height=256,
                width=256,
                color="BGR",
                resize="shorter_side",
                resize_to=224,
                crop_offset="floor",
                interpolation="bicubic",
            ),
        ),
        (
            transformers.EfficientNetImageProcessor(size={"height": 64, "width": 64}, rescale_offset=True,
                                                    rescale_factor=1 / 127.5, include_top=False),
            InputSpec(
                height=64,
                width=64,
                value_range=(-1, 1),
                mean=HALF,
                std=HALF,
                interpolation="bicubic",
            ),
        ),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_processor_is_described(processor: Any, spec: InputSpec) -> None:
    assert processor_input(processor) == spec


def test_a_processor_of_timm() -> None:
    config = {"input_size": [3, 64, 64], "mean": HALF, "std": HALF, "crop_pct": 1.0, "interpolation": "bilinear"}
    found = processor_input(transformers.TimmWrapperImageProcessor(config))
    assert (found.height, found.resize, found.resize_to, found.mean) == (64, "shorter_side", 64, HALF)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (transformers.ViTImageProcessor(do_resize=False), "ViTImageProcessor does not resize images"),
        (transformers.ViTImageProcessor(resample=4), "ViTImageProcessor resizes with Pillow's filter 4"),
        (
            transformers.CLIPImageProcessor(do_center_crop=False),
            "keeps the aspect ratio of images, so that",
        ),
        (
            transformers.ViTImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}),
            "ViTImageProcessor resizes images to ",
        ),
        (transformers.PerceiverImageProcessor(), "PerceiverImageProcessor does what a spec cannot describe"),
        (transformers.PPLCNetImageProcessor(), "PPLCNetImageProcessor does what a spec cannot describe"),
    ],
)
def test_what_a_spec_cannot_describe_is_refused(processor: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        processor_input(processor)
