"""Preprocessing equals the transforms of torchvision bit for bit, because models are trained with those."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.images.preprocess import model_input, normalize, resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec, ModelSpec

PLAIN = InputSpec(height=32, width=32)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIZES = [(1, 1), (1, 700), (700, 1), (2, 499), (32, 32), (31, 33), (32, 500), (500, 32), (64, 64), (700, 500)]


def model(spec: InputSpec) -> ModelSpec:
    return ModelSpec(model="any", class_names=("a", "b"), input=spec)


def preprocess(images: Sequence[Image.Image], spec: ModelSpec) -> NDArray[Any]:
    return model_input(np.stack([resize(image, spec.input) for image in images]), spec)


Drawing = Callable[[np.random.Generator, int, int], NDArray[Any]]


def noise(random: np.random.Generator, height: int, width: int) -> NDArray[Any]:
    return random.integers(0, 256, (height, width, 3))


def gradient(random: np.random.Generator, height: int, width: int) -> NDArray[Any]:
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    slopes = random.uniform(-400, 400, (2, 3))
    return np.asarray(128 + rows[..., None] * slopes[0] + columns[..., None] * slopes[1])


def extremes(random: np.random.Generator, height: int, width: int) -> NDArray[Any]:
    """Only black and white, on which bicubic and Lanczos filters overshoot."""
    return random.integers(0, 2, (height, width, 3)) * 255.0


def photographic(random: np.random.Generator, height: int, width: int) -> NDArray[Any]:
    """Smooth shapes with the noise of a sensor."""
    coarse = random.integers(0, 256, (max(1, height // 20), max(1, width // 20), 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(soft, np.float64) + random.normal(0, 6, (height, width, 3))


def drawn(drawing: Drawing, seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = drawing(np.random.default_rng(seed), *size)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def random_size(seed: int) -> tuple[int, int]:
    """Return a size from 1x1 to 700x500, log-uniformly distributed."""
    height, width = np.exp(np.random.default_rng(seed).uniform(0, np.log([700, 500])))
    return round(height), round(width)


@pytest.fixture(scope="module")
def torchvision_batch() -> Callable[[list[Image.Image], InputSpec], NDArray[np.float32]]:
    """Return a function that applies the transforms of torchvision."""
    import torch
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    def run(images: list[Image.Image], spec: InputSpec) -> NDArray[np.float32]:
        steps: list[Any] = [Resize((spec.height, spec.width), InterpolationMode(spec.interpolation)), ToTensor()]
        if spec.mean != PLAIN.mean or spec.std != PLAIN.std:
            steps.append(Normalize(spec.mean, spec.std))
        batch: NDArray[np.float32] = torch.stack([Compose(steps)(image) for image in images]).numpy()
        return batch

    return run


Reference = Callable[[list[Image.Image], InputSpec], NDArray[np.float32]]


def bitwise_equal(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("drawing", [noise, gradient, extremes, photographic])
def test_equals_torchvision(torchvision_batch: Reference, drawing: Drawing) -> None:
    sizes = SIZES + [random_size(seed) for seed in range(50)]
    for seed, size in enumerate(sizes):
        images = [drawn(drawing, seed, size)]
        ours = preprocess(images, model(PLAIN))
        assert bitwise_equal(ours, torchvision_batch(images, PLAIN)), f"seed {seed}, size {size}"


@pytest.mark.slow
def test_equals_torchvision_for_a_thousand_files(torchvision_batch: Reference) -> None:
    """Compare with Pillow and torchvision for files of every format, size and content."""
    drawings, kinds = (noise, gradient, extremes, photographic), ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    filters: tuple[Any, ...] = ("bilinear", "bicubic", "lanczos", "nearest")
    differing = []
    for seed in range(1000):
        file = io.BytesIO()
        drawn(drawings[seed % 4], seed, random_size(seed)).save(file, kinds[seed % 6])
        spec = InputSpec(height=32, width=32, interpolation=filters[seed % 5 % 4], mean=CIFAR10_MEAN, std=CIFAR10_STD)
        with Image.open(file) as opened:
            theirs = torchvision_batch([opened.convert("RGB")], spec)
        if not bitwise_equal(preprocess([read_image(file.getvalue())], model(spec)), theirs):
            differing.append(seed)
    assert differing == []


@pytest.mark.parametrize("filter_name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_equals_torchvision_with_every_filter(torchvision_batch: Reference, filter_name: Any) -> None:
    spec = InputSpec(height=24, width=40, interpolation=filter_name)
    images = [drawn(drawing, 1, size) for drawing in (extremes, photographic) for size in SIZES]
    assert bitwise_equal(preprocess(images, model(spec)), torchvision_batch(images, spec))


@pytest.mark.parametrize(
    ("mean", "std"),
    [(CIFAR10_MEAN, CIFAR10_STD), ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0)), ((0.0, 0.0, 0.0), (0.5, 0.25, 1.0))],
)
def test_equals_torchvision_when_normalized(
    torchvision_batch: Reference, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    spec = InputSpec(height=32, width=32, mean=mean, std=std)
    images = [drawn(photographic, seed, random_size(seed)) for seed in range(20)]
    assert bitwise_equal(preprocess(images, model(spec)), torchvision_batch(images, spec))


def test_equals_torchvision_on_a_photograph(torchvision_batch: Reference, dog: Path) -> None:
    with Image.open(dog) as photograph:
        expected = torchvision_batch([photograph.convert("RGB")], PLAIN)
    assert bitwise_equal(preprocess([read_image(dog)], model(PLAIN)), expected)


def test_every_pixel_value_equals_torchvision(torchvision_batch: Reference) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=2))
    spec = InputSpec(height=16, width=16)
    assert bitwise_equal(preprocess([image], model(spec)), torchvision_batch([image], spec))


def test_height_comes_before_width() -> None:
    spec = InputSpec(height=2, width=5)
    assert resize(Image.new("RGB", (40, 30)), spec).shape == (2, 5, 3)
    assert preprocess([Image.new("RGB", (40, 30))] * 3, model(spec)).shape == (3, 3, 2, 5)


def test_an_image_of_the_right_size_is_not_resized() -> None:
    image = drawn(noise, 0, (4, 6))
    assert np.array_equal(resize(image, InputSpec(height=4, width=6, interpolation="lanczos")), np.asarray(image))


def test_channels_come_first_in_rgb_order() -> None:
    pixels = np.zeros((1, 2, 3, 3), np.uint8)
    pixels[0, 1, 2] = (255, 51, 0)
    batch = normalize(pixels, InputSpec(height=2, width=3))
    assert batch.shape == (1, 3, 2, 3)
    assert batch[0, :, 1, 2].tolist() == [1, np.float32(0.2), 0]
    assert np.count_nonzero(batch) == 2


pixel_batches = arrays.arrays(np.uint8, st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.just(3)))
numbers = st.floats(-10, 10, width=32)
positive_numbers = st.floats(0.0625, 16, width=32)


@given(
    pixels=pixel_batches,
    ends=st.tuples(numbers, numbers),
    mean=st.tuples(numbers, numbers, numbers),
    std=st.tuples(positive_numbers, positive_numbers, positive_numbers),
)
@example(np.full((1, 1, 1, 3), 255, np.uint8), (-1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
def test_normalize_computes_the_formula_in_single_precision(
    pixels: NDArray[np.uint8],
    ends: tuple[float, float],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    before = pixels.copy()
    spec = InputSpec(height=4, width=4, value_range=ends, mean=mean, std=std)
    batch = normalize(pixels, spec)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    assert np.array_equal(pixels, before)
    low, high = ends
    exact = (pixels / 255 * (high - low) + low - np.array(mean)) / np.array(std)
    # Six roundings of numbers that are no larger than the range, the mean and their difference combined.
    largest = (abs(high) + 2 * abs(low) + np.abs(mean)) / np.array(std)
    bound = 6 * np.finfo(np.float32).eps * largest + 1e-36  # plus the smallest single-precision numbers
    assert (np.abs(batch.transpose(0, 2, 3, 1) - exact) <= bound).all()


@given(st.tuples(numbers, numbers))
def test_black_and_white_map_to_the_ends_of_the_range(ends: tuple[float, float]) -> None:
    low, high = sorted(ends)
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None, None], (256, 1, 1, 3))
    values = normalize(levels, InputSpec(height=1, width=1, value_range=(low, high)))[:, 0, 0, 0]
    assert values[0] == low
    assert values[-1] == pytest.approx(high, abs=1e-5)
    assert (np.diff(values) >= 0).all()


@given(pixels=pixel_batches)
def test_an_image_does_not_depend_on_others_in_the_batch(pixels: NDArray[np.uint8]) -> None:
    spec = InputSpec(height=4, width=4, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    alone = [normalize(image[None], spec)[0] for image in pixels]
    assert all(bitwise_equal(one, other) for one, other in zip(normalize(pixels, spec), alone, strict=True))
