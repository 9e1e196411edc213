import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from cifarx_train.data.auto_augment import OPERATIONS, AutoAugment, AutoAugmentName, Choice, apply_operations

LUMA_WEIGHTS = torch.tensor((0.299, 0.587, 0.114))
FILL = torch.tensor([1, 2, 3], dtype=torch.uint8)


def random_images(count: int, height: int = 12, width: int = 17, seed: int = 0) -> torch.Tensor:
    """Return smooth images with few levels, uint8 (count, height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.integers(30, 220, (count, 3, 4, 4)).astype(np.float32))
    levels = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def apply(name: str, value: float, images: torch.Tensor) -> torch.Tensor:
    operation = torch.full((len(images),), OPERATIONS.index(name))
    choice = Choice(operation, torch.full((len(images),), value))
    return apply_operations(images, choice, FILL, LUMA_WEIGHTS)


def torchvision_apply(name: str, value: float, images: torch.Tensor) -> torch.Tensor:
    """Apply one operation of torchvision's transforms."""
    batch, fill = images.permute(0, 3, 1, 2), FILL.tolist()
    degrees = math.degrees(math.atan(value))

    def affine(translate: list[float], shear: list[float]) -> torch.Tensor:
        moved: torch.Tensor = functional.affine(batch, 0.0, translate, 1.0, shear, fill=fill)
        return moved

    operations: dict[str, Callable[[], torch.Tensor]] = {
        "identity": lambda: batch,
        "shear_x": lambda: affine([0, 0], [degrees, 0.0]),
        "shear_y": lambda: affine([0, 0], [0.0, degrees]),
        "translate_x": lambda: affine([int(value), 0], [0.0, 0.0]),
        "translate_y": lambda: affine([0, int(value)], [0.0, 0.0]),
        "rotate": lambda: functional.rotate(batch, math.degrees(value), fill=fill),
        "brightness": lambda: functional.adjust_brightness(batch, 1 + value),
        "color": lambda: functional.adjust_saturation(batch, 1 + value),
        "contrast": lambda: functional.adjust_contrast(batch, 1 + value),
        "sharpness": lambda: functional.adjust_sharpness(batch, 1 + value),
        "posterize": lambda: functional.posterize(batch, 8 - round(value)),
        "solarize": lambda: functional.solarize(batch, 255 * (1 - value)),
        "autocontrast": lambda: functional.autocontrast(batch),
        "equalize": lambda: functional.equalize(batch),
    }
    return operations[name]().permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("identity", 0.0),
        *((name, value) for name in ("shear_x", "shear_y") for value in (-0.9, 0.31)),
        *((name, value) for name in ("translate_x", "translate_y") for value in (-5.6, 3.0)),
        *(("rotate", value) for value in (-2.1, 0.7)),
        *((name, value) for name in ("brightness", "color", "contrast", "sharpness") for value in (-0.9, 0.45)),
        *(("posterize", value) for value in (0.0, 3.4, 6.0)),
        *(("solarize", value) for value in (0.0, 0.3, 1.0)),
        ("autocontrast", 0.0),
        ("equalize", 0.0),
    ],
)
def test_every_operation_is_that_of_torchvision(name: str, value: float) -> None:
    images = random_images(4)
    ours, expected = apply(name, value, images).int(), torchvision_apply(name, value, images).int()
    difference = (ours - expected).abs()
    if name in ("rotate", "shear_x", "shear_y"):  # pixels halfway between two others are read from either
        assert (difference > 0).float().mean() < 0.03
    else:
        assert difference.max() <= 1


@pytest.mark.parametrize("name", ["autocontrast", "equalize", "sharpness", "contrast"])
def test_images_of_one_color_and_tiny_images_are_supported(name: str) -> None:
    images = torch.full((2, 2, 2, 3), 77, dtype=torch.uint8)
    assert torch.equal(apply(name, 0.5, images), torchvision_apply(name, 0.5, images))


def test_each_image_gets_its_own_operation() -> None:
    images = random_images(len(OPERATIONS))
    values = torch.linspace(0.1, 0.9, len(OPERATIONS))
    mixed = apply_operations(images, Choice(torch.arange(len(OPERATIONS)), values), FILL, LUMA_WEIGHTS)
    for position, name in enumerate(OPERATIONS):
        alone = apply(name, float(values[position]), images[position : position + 1])
        assert torch.equal(mixed[position : position + 1], alone), name


@settings(max_examples=30)
@given(
    name=st.sampled_from(["trivial", "rand"]),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_any_image_keeps_its_shape(name: AutoAugmentName, channels: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (30, height, width, channels), dtype=torch.uint8)
    before = images.clone()
    augment = AutoAugment(
        name, (height, width), FILL[:channels], LUMA_WEIGHTS[:channels] / LUMA_WEIGHTS[:channels].sum()
    )
    result = augment(images)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)


def test_strengths_differ_between_images_and_are_repeated_with_the_seed() -> None:
    images = random_images(1, 24, 24).expand(400, -1, -1, -1)
    augment = AutoAugment("trivial", (24, 24), FILL, LUMA_WEIGHTS)
    torch.manual_seed(3)
    first = augment(images)
    torch.manual_seed(3)
    assert torch.equal(augment(images), first)
    assert len(torch.unique(first.flatten(1), dim=0)) > 150
    unchanged = (first == images).all(3).all(2).all(1).float().mean()
    assert 0.05 < unchanged < 0.35  # one operation of 14 changes nothing, and so do the weakest of the others
