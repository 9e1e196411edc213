import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional

from cifarx_serve.spec import InputSpec
from cifarx_train.data.augmentation import (
    Augmentation,
    color_jitter,
    cutout,
    random_crop_flip,
    random_erasing,
    random_resized_crop,
)
from cifarx_train.data.mixing import MixedLabels
from cifarx_train.recipes import load_recipe

CPU = torch.device("cpu")
LUMA_WEIGHTS = torch.tensor((0.299, 0.587, 0.114))
FILL = torch.tensor([1, 2, 3], dtype=torch.uint8)
LABELS = torch.arange(60) % 3

sides = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def random_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def indexed_images(count: int, height: int, width: int) -> torch.Tensor:
    """Return images whose pixels contain the index of the image, the row and the column."""
    images = np.zeros((count, height, width, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 1] = np.arange(height)[None, :, None]
    images[..., 2] = np.arange(width)[None, None, :]
    return torch.from_numpy(images)


def reference_crop_flip(images: NDArray[np.uint8], padding: int, flip: bool, seed: int) -> NDArray[np.uint8]:
    """Pad, crop and mirror one image at a time, with the same random numbers."""
    torch.manual_seed(seed)
    count, height, width, _ = images.shape
    rows = torch.randint(-padding, padding + 1, (count,)).tolist() if padding else [0] * count
    columns = torch.randint(-padding, padding + 1, (count,)).tolist() if padding else [0] * count
    mirrored = (torch.rand(count) < 0.5).tolist() if flip else [False] * count
    result = np.empty_like(images)
    for number, (row, column, mirror) in enumerate(zip(rows, columns, mirrored, strict=True)):
        padded = np.pad(images[number], ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
        top, left = padding + row, padding + column
        crop = padded[top : top + height, left : left + width]
        result[number] = crop[:, ::-1] if mirror else crop
    return result


@given(
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    count=st.integers(1, 8),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    seed=seeds,
)
def test_random_crop_flip_is_a_crop_of_the_padded_image(
    height: int, width: int, count: int, padding: int, flip: bool, seed: int
) -> None:
    images = random_images(count, height, width, seed)
    torch.manual_seed(seed)
    result = random_crop_flip(images, padding, flip)
    assert result.dtype == torch.uint8
    assert np.array_equal(result.numpy(), reference_crop_flip(images.numpy(), padding, flip, seed))


@given(height=sides, width=sides, count=st.integers(1, 8), padding=st.integers(0, 20), flip=st.booleans(), seed=seeds)
def test_every_pixel_comes_from_the_same_image(
    height: int, width: int, count: int, padding: int, flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    result = random_crop_flip(indexed_images(count, height, width), padding, flip)
    assert result.shape == (count, height, width, 3)
    assert torch.equal(result[..., 0], indexed_images(count, height, width)[..., 0])
    assert (result[..., 1] < height).all()
    assert (result[..., 2] < width).all()
    assert (result[:, :, :1, 1] == result[..., 1]).all()  # rows are moved as a whole
    assert (result[:, :1, :, 2] == result[..., 2]).all()  # and so are columns


@given(height=sides, width=sides, seed=seeds)
def test_without_padding_and_flip_nothing_changes(height: int, width: int, seed: int) -> None:
    images = random_images(3, height, width, seed)
    assert torch.equal(random_crop_flip(images, 0, False), images)


def test_half_of_the_images_are_mirrored() -> None:
    images = indexed_images(256, 2, 5).repeat(8, 1, 1, 1)
    torch.manual_seed(0)
    first = random_crop_flip(images, 0, True)[:, 0, 0, 2]
    assert set(first.tolist()) == {0, 4}
    assert 0.45 < (first == 4).float().mean() < 0.55


def test_every_offset_is_equally_likely() -> None:
    images = indexed_images(1, 9, 9).repeat(5000, 1, 1, 1)
    torch.manual_seed(0)
    middle = random_crop_flip(images, 2, False)[:, 4, 4].long()
    for axis in (1, 2):
        counts = torch.bincount(middle[:, axis], minlength=9)
        assert counts[[0, 1, 7, 8]].sum() == 0
        assert (counts[2:7].float() / 5000 - 0.2).abs().max() < 0.03
    together = torch.bincount(middle[:, 1] * 9 + middle[:, 2])
    assert (together > 0).sum() == 25  # the offsets of the axes are independent


# --- cutout


@given(height=sides, width=sides, side=st.integers(1, 12), seed=seeds)
def test_cutout_fills_one_square(height: int, width: int, side: int, seed: int) -> None:
    images = torch.full((20, height, width, 3), 255, dtype=torch.uint8)
    torch.manual_seed(seed)
    result = cutout(images, side, FILL)
    filled = (result == FILL).all(3)
    assert torch.equal(filled, (result != 255).any(3))
    for hole in filled.numpy():
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns) > 0  # a filled rectangle
        for span, size in ((rows, height), (columns, width)):
            assert np.array_equal(span, np.arange(span[0], span[-1] + 1))
            at_the_border = span[0] == 0 or span[-1] == size - 1
            assert len(span) <= side if at_the_border else len(span) == side


def test_every_pixel_is_equally_likely_to_be_filled() -> None:
    images = torch.full((20_000, 5, 7, 3), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    frequency = (cutout(images, 1, FILL) != 255).any(3).float().mean(0)
    assert frequency.shape == (5, 7)
    assert (frequency - 1 / 35).abs().max() < 0.006


def test_the_images_are_not_changed() -> None:
    augmentations: list[Callable[[torch.Tensor], object]] = [
        lambda images: cutout(images, 2, FILL),
        lambda images: color_jitter(images, 0.5, LUMA_WEIGHTS),
    ]
    for augment in augmentations:
        images = random_images(4, 6, 6)
        before = images.clone()
        augment(images)
        assert torch.equal(images, before)


# --- color jitter


@given(height=sides, width=sides, seed=seeds)
def test_a_strength_of_zero_changes_nothing(height: int, width: int, seed: int) -> None:
    images = random_images(3, height, width, seed)
    assert torch.equal(color_jitter(images, 0.0, LUMA_WEIGHTS), images)


@given(height=sides, width=sides, strength=st.floats(0, 1, exclude_max=True), seed=seeds)
def test_color_jitter_multiplies_by_random_factors(height: int, width: int, strength: float, seed: int) -> None:
    images = random_images(3, height, width, seed)
    torch.manual_seed(seed)
    result = color_jitter(images, strength, LUMA_WEIGHTS)
    assert (result.dtype, result.shape) == (torch.uint8, images.shape)
    torch.manual_seed(seed)
    brightness, contrast, saturation = (torch.rand(3, 3) * 2 * strength + 1 - strength).double().numpy()
    for number in range(3):
        levels = images[number].double().numpy() * brightness[number]
        mean = (levels @ LUMA_WEIGHTS.double().numpy()).mean()
        levels = mean + (levels - mean) * contrast[number]
        luma = (levels @ LUMA_WEIGHTS.double().numpy())[..., None]
        levels = luma + (levels - luma) * saturation[number]
        assert np.abs(result[number].numpy() - np.clip(levels, 0, 255)).max() <= 0.51


def test_color_jitter_of_gray_images_is_gray_and_differs_per_image() -> None:
    images = torch.full((50, 4, 4, 3), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    result = color_jitter(images, 0.4, LUMA_WEIGHTS).int()
    assert (result.amax(3) - result.amin(3)).max() <= 1
    assert len({int(level) for level in result[:, 0, 0, 0]}) > 20
    assert 60 <= result.min() <= result.max() <= 140


# --- recipes


def augmented(images: torch.Tensor, spec: InputSpec | None = None, **values: Any) -> torch.Tensor:
    spec = spec or InputSpec(height=images.shape[1], width=images.shape[2])
    return Augmentation(load_recipe("notes", overrides=values), spec, CPU)(images)


def test_without_augmentation_no_random_numbers_are_used() -> None:
    images, state = random_images(5, 6, 6), torch.get_rng_state()
    assert torch.equal(augmented(images), images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "values", [{"flip": True}, {"crop": 2}, {"cutout": 3}, {"jitter": 0.4}, {"flip": True, "crop": 2, "jitter": 0.1}]
)
def test_the_default_generator_is_used(values: dict[str, Any]) -> None:
    images = random_images(40, 8, 6)
    torch.manual_seed(1)
    first = augmented(images, **values)
    second = augmented(images, **values)
    torch.manual_seed(1)
    assert torch.equal(augmented(images, **values), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, images)
    assert (first.shape, first.dtype) == (images.shape, images.dtype)


def test_crop_and_flip_come_from_the_recipe() -> None:
    images = random_images(20, 8, 6)
    torch.manual_seed(3)
    result = augmented(images, flip=True, crop=2).numpy()
    assert np.array_equal(result, reference_crop_flip(images.numpy(), 2, True, 3))
    torch.manual_seed(3)
    assert np.array_equal(augmented(images, crop=3).numpy(), reference_crop_flip(images.numpy(), 3, False, 3))


def test_color_jitter_of_one_channel_changes_brightness_and_contrast() -> None:
    """It is that of a gray image with three channels."""
    gray = random_images(8, 6, 6)[..., :1]
    torch.manual_seed(0)
    expected = color_jitter(gray.expand(-1, -1, -1, 3), 0.4, LUMA_WEIGHTS)[..., :1]
    torch.manual_seed(0)
    found = color_jitter(gray, 0.4, torch.ones(1))
    assert (found.int() - expected.int()).abs().max() <= 1  # the luma of gray is rounded differently
    assert not torch.equal(found, gray)


def test_every_augmentation_takes_grayscale_images() -> None:
    gray = InputSpec(height=8, width=8, channels=1, color="L", mean=(0.4,))
    images = torch.full((9, 8, 8, 1), 7, dtype=torch.uint8)
    result = augmented(images, gray, flip=True, crop=2, cutout=4)
    assert result.shape == images.shape
    assert set(result.flatten().tolist()) == {7, 102}
    assert augmented(images, gray, flip=True, crop=2, cutout=4, jitter=0.3).shape == images.shape


def test_the_fill_color_of_a_bgr_network_is_rgb_as_the_images_are() -> None:
    spec = InputSpec(height=8, width=8, color="BGR", mean=(1.0, 0.4, 0.2))
    result = augmented(torch.full((9, 8, 8, 3), 7, dtype=torch.uint8), spec, cutout=4)
    assert set(map(tuple, result[(result != 7).any(3)].tolist())) == {(51, 102, 255)}


@pytest.mark.parametrize(
    ("spec", "color"),
    [
        (InputSpec(height=8, width=8), [0, 0, 0]),
        (InputSpec(height=8, width=8, mean=(0.2, 0.4, 1.0), std=(0.1, 0.2, 0.3)), [51, 102, 255]),
        (InputSpec(height=8, width=8, value_range=(-1.0, 1.0), mean=(-1.0, 0.2, 1.0)), [0, 153, 255]),
        (InputSpec(height=8, width=8, mean=(-3.0, 9.0, 0.0)), [0, 255, 0]),
    ],
)
def test_the_fill_color_of_cutout_is_zero_for_the_network(spec: InputSpec, color: list[int]) -> None:
    images = torch.full((9, 8, 8, 3), 7, dtype=torch.uint8)
    result = augmented(images, spec, cutout=4)
    changed = result[(result != 7).any(3)]
    assert len(changed) >= 9 * 4
    assert set(map(tuple, changed.tolist())) == {tuple(color)}


# --- random resized crop


def test_a_random_resized_crop_is_that_of_torchvision() -> None:
    images = random_images(40, 11, 14, seed=5)
    torch.manual_seed(2)
    result = random_resized_crop(images, 0.1)
    torch.manual_seed(2)  # the same random numbers again, one image at a time
    area = torch.empty(40, 1).uniform_(0.1, 1.0) * 11 * 14
    ratio = torch.empty(40, 1).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    heights = (area / ratio).sqrt().round().clamp(1, 11)
    widths = (area * ratio).sqrt().round().clamp(1, 14)
    top = (torch.rand(40, 1) * (11 - heights + 1)).floor()
    left = (torch.rand(40, 1) * (14 - widths + 1)).floor()
    boxes = torch.cat((top, left, heights, widths), 1).int().tolist()
    assert len(set(map(tuple, boxes))) > 30
    for number, (y, x, height, width) in enumerate(boxes):
        crop = functional.resized_crop(images[number].permute(2, 0, 1), y, x, height, width, [11, 14], antialias=False)
        assert (crop.permute(1, 2, 0).int() - result[number].int()).abs().max() <= 1


def test_a_crop_of_the_whole_image_changes_nothing() -> None:
    images = random_images(3, 8, 8)
    torch.manual_seed(0)
    crops = random_resized_crop(images.repeat(50, 1, 1, 1), 0.999)
    assert (crops[:3].shape, crops.dtype) == (images.shape, torch.uint8)
    assert (crops == images.repeat(50, 1, 1, 1)).all((1, 2, 3)).float().mean() > 0.3  # the others have another ratio


# --- random erasing


def test_random_erasing_fills_one_rectangle_within_the_image() -> None:
    images = torch.full((3000, 20, 30, 3), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    result = random_erasing(images, 0.25, FILL)
    filled = (result == FILL).all(3)
    assert torch.equal(filled, (result != 255).any(3))
    areas = filled.float().mean((1, 2))
    assert 0.22 < (areas > 0).float().mean() < 0.28
    assert areas.max() <= 0.36
    for hole in filled[areas > 0].numpy():
        assert hole.sum() == hole.any(0).sum() * hole.any(1).sum()


# --- all together


def test_every_augmentation_of_a_recipe_is_applied_and_repeats_with_the_seed() -> None:
    spec = InputSpec(height=12, width=10)
    images = random_images(60, 12, 10)
    for values in (
        {"random_resized_crop": 0.3},
        {"auto_augment": "trivial"},
        {"auto_augment": "rand"},
        {"random_erasing": 1.0},
    ):
        augment = Augmentation(load_recipe("notes", overrides=values), spec, CPU)
        torch.manual_seed(1)
        first = augment(images)
        assert not torch.equal(first, images), values
        torch.manual_seed(1)
        assert torch.equal(augment(images), first)
        assert augment.mix(images, LABELS)[0] is images
    mixed, targets = Augmentation(load_recipe("notes", overrides={"cutmix": 1.0}), spec, CPU).mix(images, LABELS)
    assert isinstance(targets, MixedLabels)
    assert not torch.equal(mixed, images)
