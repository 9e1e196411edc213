from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cifarx_serve.spec import InputSpec
from cifarx_train.data.augmentation import Augmentation, cut_out, jitter, shift
from cifarx_train.recipes import recipe

CPU = torch.device("cpu")
GREY = torch.tensor((0.299, 0.587, 0.114))
BLANK = torch.tensor([1, 2, 3], dtype=torch.uint8)

sides = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def random_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def numbered(count: int, height: int, width: int) -> torch.Tensor:
    """Every pixel says of which image it is, and where: number, row, column."""
    images = np.zeros((count, height, width, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 1] = np.arange(height)[None, :, None]
    images[..., 2] = np.arange(width)[None, None, :]
    return torch.from_numpy(images)


def slowly_shifted(images: NDArray[np.uint8], reach: int, flip: bool, seed: int) -> NDArray[np.uint8]:
    """Pad, crop and mirror one image after the other, with the same draws."""
    torch.manual_seed(seed)
    count, height, width, _ = images.shape
    rows = torch.randint(-reach, reach + 1, (count,)).tolist() if reach else [0] * count
    columns = torch.randint(-reach, reach + 1, (count,)).tolist() if reach else [0] * count
    mirrored = (torch.rand(count) < 0.5).tolist() if flip else [False] * count
    answer = np.empty_like(images)
    for number, (row, column, mirror) in enumerate(zip(rows, columns, mirrored, strict=True)):
        padded = np.pad(images[number], ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
        top, left = reach + row, reach + column
        crop = padded[top : top + height, left : left + width]
        answer[number] = crop[:, ::-1] if mirror else crop
    return answer


@given(
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    count=st.integers(1, 8),
    reach=st.integers(0, 3),
    flip=st.booleans(),
    seed=seeds,
)
def test_a_shift_is_a_crop_of_the_reflected_image(
    height: int, width: int, count: int, reach: int, flip: bool, seed: int
) -> None:
    images = random_images(count, height, width, seed)
    torch.manual_seed(seed)
    there = shift(images, reach, flip)
    assert there.dtype == torch.uint8
    assert np.array_equal(there.numpy(), slowly_shifted(images.numpy(), reach, flip, seed))


@given(height=sides, width=sides, count=st.integers(1, 8), reach=st.integers(0, 20), flip=st.booleans(), seed=seeds)
def test_every_pixel_comes_from_its_own_image(
    height: int, width: int, count: int, reach: int, flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    there = shift(numbered(count, height, width), reach, flip)
    assert there.shape == (count, height, width, 3)
    assert torch.equal(there[..., 0], numbered(count, height, width)[..., 0])
    assert (there[..., 1] < height).all()
    assert (there[..., 2] < width).all()
    assert (there[:, :, :1, 1] == there[..., 1]).all()  # rows stay rows
    assert (there[:, :1, :, 2] == there[..., 2]).all()  # and columns columns


@given(height=sides, width=sides, seed=seeds)
def test_no_reach_and_no_flip_change_nothing(height: int, width: int, seed: int) -> None:
    images = random_images(3, height, width, seed)
    assert torch.equal(shift(images, 0, False), images)


def test_half_of_the_images_are_mirrored_and_the_others_are_not() -> None:
    images = numbered(256, 2, 5).repeat(8, 1, 1, 1)
    torch.manual_seed(0)
    first = shift(images, 0, True)[:, 0, 0, 2]
    assert set(first.tolist()) == {0, 4}
    assert 0.45 < (first == 4).float().mean() < 0.55


def test_every_offset_comes_about_as_often_along_both_axes() -> None:
    images = numbered(1, 9, 9).repeat(5000, 1, 1, 1)
    torch.manual_seed(0)
    middle = shift(images, 2, False)[:, 4, 4].long()
    for axis in (1, 2):
        counts = torch.bincount(middle[:, axis], minlength=9)
        assert counts[[0, 1, 7, 8]].sum() == 0
        assert (counts[2:7].float() / 5000 - 0.2).abs().max() < 0.03
    together = torch.bincount(middle[:, 1] * 9 + middle[:, 2])
    assert (together > 0).sum() == 25  # the axes are drawn apart


# --- cutout


@given(height=sides, width=sides, side=st.integers(1, 12), seed=seeds)
def test_a_cutout_is_one_square_of_the_blank_colour(height: int, width: int, side: int, seed: int) -> None:
    images = torch.full((20, height, width, 3), 255, dtype=torch.uint8)
    torch.manual_seed(seed)
    there = cut_out(images, side, BLANK)
    blanked = (there == BLANK).all(3)
    assert torch.equal(blanked, (there != 255).any(3))
    for hole in blanked.numpy():
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns) > 0  # a rectangle without gaps
        for places, size in ((rows, height), (columns, width)):
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            at_the_edge = places[0] == 0 or places[-1] == size - 1
            assert len(places) <= side if at_the_edge else len(places) == side


def test_every_pixel_is_as_likely_to_be_cut_out() -> None:
    images = torch.full((20_000, 5, 7, 3), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    share = (cut_out(images, 1, BLANK) != 255).any(3).float().mean(0)
    assert share.shape == (5, 7)
    assert (share - 1 / 35).abs().max() < 0.006


def test_the_input_is_left_as_it_was() -> None:
    for change in (lambda images: cut_out(images, 2, BLANK), lambda images: jitter(images, 0.5, GREY)):
        images = random_images(4, 6, 6)
        before = images.clone()
        change(images)
        assert torch.equal(images, before)


# --- jitter


@given(height=sides, width=sides, seed=seeds)
def test_jitter_by_nothing_changes_nothing(height: int, width: int, seed: int) -> None:
    images = random_images(3, height, width, seed)
    assert torch.equal(jitter(images, 0.0, GREY), images)


@given(height=sides, width=sides, share=st.floats(0, 1, exclude_max=True), seed=seeds)
def test_jitter_gives_images_again(height: int, width: int, share: float, seed: int) -> None:
    images = random_images(3, height, width, seed)
    torch.manual_seed(seed)
    there = jitter(images, share, GREY)
    assert (there.dtype, there.shape) == (torch.uint8, images.shape)
    torch.manual_seed(seed)
    brightness, contrast, saturation = (torch.rand(3, 3) * 2 * share + 1 - share).double().numpy()
    for number in range(3):
        levels = images[number].double().numpy() * brightness[number]
        mean = (levels @ GREY.double().numpy()).mean()
        levels = mean + (levels - mean) * contrast[number]
        greys = (levels @ GREY.double().numpy())[..., None]
        levels = greys + (levels - greys) * saturation[number]
        assert np.abs(there[number].numpy() - np.clip(levels, 0, 255)).max() <= 0.51


def test_jitter_of_grey_images_is_grey_and_images_differ() -> None:
    images = torch.full((50, 4, 4, 3), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    there = jitter(images, 0.4, GREY).int()
    assert (there.amax(3) - there.amin(3)).max() <= 1
    assert len({int(level) for level in there[:, 0, 0, 0]}) > 20
    assert 60 <= there.min() <= there.max() <= 140


# --- as a recipe has it


def augmented(images: torch.Tensor, spec: InputSpec | None = None, **values: Any) -> torch.Tensor:
    wanted = spec or InputSpec(height=images.shape[1], width=images.shape[2])
    return Augmentation(recipe("notes", overrides=values), wanted, CPU)(images)


def test_without_augmentation_nothing_is_changed_or_drawn() -> None:
    images, state = random_images(5, 6, 6), torch.get_rng_state()
    assert torch.equal(augmented(images), images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "values", [{"flip": True}, {"crop": 2}, {"cutout": 3}, {"jitter": 0.4}, {"flip": True, "crop": 2, "jitter": 0.1}]
)
def test_the_generator_decides(values: dict[str, Any]) -> None:
    images = random_images(40, 8, 6)
    torch.manual_seed(1)
    one = augmented(images, **values)
    other = augmented(images, **values)
    torch.manual_seed(1)
    assert torch.equal(augmented(images, **values), one)
    assert not torch.equal(one, other)
    assert not torch.equal(one, images)
    assert (one.shape, one.dtype) == (images.shape, images.dtype)


def test_crop_and_flip_are_those_of_the_recipe() -> None:
    images = random_images(20, 8, 6)
    torch.manual_seed(3)
    there = augmented(images, flip=True, crop=2).numpy()
    assert np.array_equal(there, slowly_shifted(images.numpy(), 2, True, 3))
    torch.manual_seed(3)
    assert np.array_equal(augmented(images, crop=3).numpy(), slowly_shifted(images.numpy(), 3, False, 3))


@pytest.mark.parametrize(
    ("spec", "colour"),
    [
        (InputSpec(height=8, width=8), [0, 0, 0]),
        (InputSpec(height=8, width=8, mean=(0.2, 0.4, 1.0), std=(0.1, 0.2, 0.3)), [51, 102, 255]),
        (InputSpec(height=8, width=8, value_range=(-1.0, 1.0), mean=(-1.0, 0.2, 1.0)), [0, 153, 255]),
        (InputSpec(height=8, width=8, mean=(-3.0, 9.0, 0.0)), [0, 255, 0]),
    ],
)
def test_a_cutout_has_the_colour_that_the_network_sees_as_zero(spec: InputSpec, colour: list[int]) -> None:
    images = torch.full((9, 8, 8, 3), 7, dtype=torch.uint8)
    there = augmented(images, spec, cutout=4)
    changed = there[(there != 7).any(3)]
    assert len(changed) >= 9 * 4
    assert set(map(tuple, changed.tolist())) == {tuple(colour)}
