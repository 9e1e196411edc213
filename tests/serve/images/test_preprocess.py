"""Preprocessing equals the transforms of torchvision bit for bit, because models are trained with those."""

import io
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.images.preprocess import (
    is_unchanged,
    model_input,
    model_pixels,
    normalize,
    peak_pixels,
    resize,
    undo_crop,
)
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


def torchvision_steps(spec: InputSpec) -> list[Any]:
    """Return the transforms of torchvision that people train with, from a Pillow image to pixels."""
    from torchvision.transforms import CenterCrop, Grayscale, InterpolationMode, Resize

    size, mode = (spec.height, spec.width), InterpolationMode(spec.interpolation)
    steps: list[Any] = [Grayscale()] if spec.color == "L" else []
    if spec.resize == "letterbox":
        return [*steps, lambda image: letterbox(image, spec)]
    default = spec.height if spec.resize == "shorter_side" else size
    return [*steps, Resize(spec.resize_to or default, mode), CenterCrop(size)]


def letterbox(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Fit an image into the input size with the roundings of Ultralytics."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    ratio = min(spec.height / image.height, spec.width / image.width)
    height, width = (max(1, round(side * ratio)) for side in (image.height, image.width))
    resized = transforms.resize(image, [height, width], InterpolationMode(spec.interpolation))
    half_width, half_height = (spec.width - width) / 2, (spec.height - height) / 2
    left, right = round(half_width - 0.1), round(half_width + 0.1)
    top, bottom = round(half_height - 0.1), round(half_height + 0.1)
    padded: Image.Image = transforms.pad(resized, [left, top, right, bottom], fill=spec.fill)
    return padded


@pytest.fixture(scope="module")
def torchvision_batch() -> Callable[[list[Image.Image], InputSpec], NDArray[np.float32]]:
    """Return a function that applies the transforms of torchvision."""
    import torch
    from torchvision.transforms import Compose, Normalize, ToTensor

    def run(images: list[Image.Image], spec: InputSpec) -> NDArray[np.float32]:
        steps = [*torchvision_steps(spec), ToTensor()]
        if any(spec.mean) or any(std != 1 for std in spec.std):
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
    for spec in (PLAIN, InputSpec(height=224, width=224, resize="shorter_side", resize_to=256)):
        with Image.open(dog) as photograph:
            expected = torchvision_batch([photograph.convert("RGB")], spec)
        assert bitwise_equal(preprocess([read_image(dog)], model(spec)), expected)


CROPS = {
    "shorter side": InputSpec(height=28, width=28, resize="shorter_side", resize_to=32),
    "shorter side alone": InputSpec(height=30, width=30, resize="shorter_side"),
    "odd margins": InputSpec(height=25, width=24, resize="shorter_side", resize_to=32),
    "a crop wider than the shorter side": InputSpec(height=24, width=48, resize="shorter_side", resize_to=31),
    "a crop larger than the image": InputSpec(height=45, width=50, resize="shorter_side", resize_to=32),
    "stretch and crop": InputSpec(height=28, width=21, resize_to=(33, 32)),
    "stretch and pad": InputSpec(height=28, width=41, resize_to=(33, 32)),
    "letterbox": InputSpec(height=32, width=32, resize="letterbox", fill=114),
    "letterbox that is not square": InputSpec(height=31, width=44, resize="letterbox", fill=(124, 116, 104)),
    "grayscale": InputSpec(height=28, width=28, channels=1, color="L", resize="shorter_side", resize_to=32),
    "grayscale letterbox": InputSpec(height=28, width=40, channels=1, color="L", resize="letterbox", fill=114),
}


@pytest.mark.parametrize("name", CROPS)
def test_equals_torchvision_with_crops_and_padding(torchvision_batch: Reference, name: str) -> None:
    spec = CROPS[name]
    for seed, size in enumerate(SIZES + [random_size(seed) for seed in range(30)]):
        images = [drawn((photographic, noise)[seed % 2], seed, size)]
        assert bitwise_equal(preprocess(images, model(spec)), torchvision_batch(images, spec)), f"{seed}, {size}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(height=224, width=224, resize="shorter_side", resize_to=256),
        InputSpec(height=224, width=224, resize="shorter_side", resize_to=235, interpolation="bicubic"),
        InputSpec(height=240, width=240, resize_to=(256, 256), interpolation="bicubic"),
        InputSpec(height=160, width=224, resize="letterbox", fill=114),
        InputSpec(height=224, width=224, channels=1, color="L", resize="shorter_side", resize_to=256),
    ],
    ids=lambda spec: f"{spec.color} {spec.resize} {spec.resize_to}",
)
def test_equals_torchvision_for_a_thousand_images(torchvision_batch: Reference, spec: InputSpec) -> None:
    """No image is wider than 64 times its height, or the other way round. Panoramas are tested below."""
    drawings = (noise, gradient, extremes, photographic)
    sizes = (size for seed in range(2000) if max(size := random_size(seed)) <= 64 * min(size))
    differing = []
    for seed, size in zip(range(1000), sizes, strict=False):
        images = [drawn(drawings[seed % 4], seed, size)]
        if not bitwise_equal(preprocess(images, model(spec)), torchvision_batch(images, spec)):
            differing.append(seed)
    assert differing == []


@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(1, 700), (700, 1), (3, 900), (1200, 4)])
def test_a_panorama_equals_torchvision_up_to_one_level(
    filter_name: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = InputSpec(height=30, width=28, resize="shorter_side", resize_to=33, interpolation=filter_name)
    image = drawn(noise, 0, size)
    whole = resize(image, spec).astype(int)
    monkeypatch.setattr("cifarx_serve.images.preprocess.MAX_RESIZED_PIXELS", 1000)
    within = resize(image, spec)
    assert within.shape == (30, 28, 3)
    assert np.abs(within - whole).max() <= 1


def test_a_crop_larger_than_a_panorama_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = InputSpec(height=48, width=40, resize="shorter_side", resize_to=33, fill=(1, 2, 3))
    whole = resize(drawn(noise, 0, (900, 3)), spec).astype(int)
    monkeypatch.setattr("cifarx_serve.images.preprocess.MAX_RESIZED_PIXELS", 1000)
    within = resize(drawn(noise, 0, (900, 3)), spec)
    assert np.abs(within - whole).max() <= 1
    assert (within[:, 0] == (1, 2, 3)).all()


@pytest.mark.parametrize("fields", [{}, {"antialias": False}, {"interpolation": "nearest"}])
def test_a_long_panorama_takes_little_memory(fields: dict[str, Any]) -> None:
    """Resized as a whole, it would take 65 GB."""
    spec = InputSpec(height=224, width=224, resize="shorter_side", resize_to=256, **fields)
    for size in ((1, 1_000_000), (1_000_000, 1)):
        tracemalloc.start()
        pixels = resize(Image.new("RGB", size, (10, 20, 30)), spec)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (pixels == (10, 20, 30)).all()
        assert peak < 64 << 20


def test_the_pixels_before_the_crop_are_counted() -> None:
    spec = InputSpec(height=224, width=224, resize="shorter_side", resize_to=256)
    assert peak_pixels(1, 1000, spec) == 256 * 256_000
    assert peak_pixels(2000, 1000, spec) == 2000 * 1000
    assert peak_pixels(10, 10, InputSpec(height=20, width=30)) == 100


TIMM_CROPS = {
    "center": InputSpec(height=32, width=32, resize="shorter_side", resize_to=36, interpolation="bicubic"),
    "squash": InputSpec(height=32, width=32, resize_to=(36, 36), interpolation="bicubic"),
    "border": InputSpec(height=32, width=32, resize="letterbox", fill=(124, 116, 104), interpolation="bicubic"),
}


@pytest.mark.parametrize("crop_mode", TIMM_CROPS)
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_equals_the_crop_modes_of_timm(crop_mode: str, count: int) -> None:
    timm_data = pytest.importorskip("timm.data", reason="the extra timm is not installed")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    spec = msgspec.structs.replace(TIMM_CROPS[crop_mode], mean=mean, std=std)
    transform = timm_data.create_transform(
        input_size=(3, 32, 32),
        interpolation="bicubic",
        mean=mean,
        std=std,
        crop_pct=1.0 if crop_mode == "border" else 32 / 36,
        crop_mode=crop_mode,
    )
    # With "border", timm resizes a longer image to a height or width of zero, which fails.
    sizes = (size for seed in range(2 * count) if max(size := random_size(seed)) <= 32 * min(size))
    differing = []
    for seed, size in zip(range(count), sizes, strict=False):
        image = drawn((photographic, noise, extremes)[seed % 3], seed, size)
        if not bitwise_equal(preprocess([image], model(spec))[0], transform(image).numpy()):
            differing.append(seed)
    assert differing == []


def test_padded_pixels_have_the_fill_value_in_the_order_of_the_color() -> None:
    fill = (10, 20, 30)
    white = Image.new("RGB", (40, 20), "white")
    for color, expected in (("RGB", (10, 20, 30)), ("BGR", (30, 20, 10))):
        spec = InputSpec(height=40, width=40, resize="letterbox", color=color, fill=fill)  # type: ignore[arg-type]
        pixels = resize(white, spec)
        assert (pixels[:10] == expected).all()
        assert (pixels[30:] == expected).all()
        assert (pixels[10:30] == 255).all()
        # The network gets the fill value of each channel in its own order.
        assert (normalize(pixels[None], spec)[0, :, 0, 0] * 255).round().tolist() == list(fill)


# A resized value and the sum of its weighted neighbors differ only where the sum is close to a half.
MAX_DIFFERING = {"nearest": 0.0, "bilinear": 0.01, "bicubic": 0.01}


@pytest.mark.parametrize("filter_name", MAX_DIFFERING)
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_equals_the_tensors_of_torchvision_without_antialiasing(filter_name: Any, count: int) -> None:
    """The bound is one level, in at most one of a hundred values."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    spec = InputSpec(height=28, width=37, interpolation=filter_name, antialias=False)
    different: Any = 0
    values = 0
    for seed in range(count):
        image = drawn((photographic, noise, extremes)[seed % 3], seed, (SIZES + [random_size(seed)] * count)[seed])
        tensor = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)
        resized = transforms.resize(tensor, [28, 37], InterpolationMode(filter_name), antialias=False)
        expected = resized.round().clamp(0, 255).permute(1, 2, 0).numpy()
        difference = np.abs(resize(image, spec) - expected)
        assert difference.max() <= (0 if filter_name == "nearest" else 1), f"seed {seed}"
        different, values = different + np.count_nonzero(difference), values + difference.size
    assert different <= MAX_DIFFERING[filter_name] * values


@pytest.mark.parametrize(("crop_offset", "start"), [("round", 4), ("floor", 3)])
def test_where_an_odd_number_of_pixels_is_cut_off(crop_offset: Any, start: int) -> None:
    image = drawn(photographic, 0, (70, 70))
    whole = resize(image, InputSpec(height=35, width=35))
    spec = InputSpec(height=28, width=28, resize="shorter_side", resize_to=35, crop_offset=crop_offset)
    assert np.array_equal(resize(image, spec), whole[start : start + 28, start : start + 28])
    stretched = InputSpec(height=28, width=28, resize_to=(35, 35), crop_offset=crop_offset)
    assert np.array_equal(resize(image, stretched), whole[start : start + 28, start : start + 28])


def test_crops_after_resizing_without_antialiasing() -> None:
    image = drawn(photographic, 0, (90, 70))
    whole = resize(image, InputSpec(height=41, width=32, antialias=False))
    spec = InputSpec(height=28, width=28, resize="shorter_side", resize_to=32, antialias=False)
    assert np.array_equal(resize(image, spec), whole[6:34, 2:30])


def test_grayscale_without_antialiasing() -> None:
    image = drawn(photographic, 0, (90, 70))
    spec = InputSpec(height=28, width=28, channels=1, color="L", antialias=False)
    gray = resize(image.convert("L").convert("RGB"), InputSpec(height=28, width=28, antialias=False))
    assert np.array_equal(resize(image, spec), gray[..., :1])


def test_every_pixel_value_equals_torchvision(torchvision_batch: Reference) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=2))
    spec = InputSpec(height=16, width=16)
    assert bitwise_equal(preprocess([image], model(spec)), torchvision_batch([image], spec))


def test_height_comes_before_width() -> None:
    spec = InputSpec(height=2, width=5)
    assert resize(Image.new("RGB", (40, 30)), spec).shape == (2, 5, 3)
    assert preprocess([Image.new("RGB", (40, 30))] * 3, model(spec)).shape == (3, 3, 2, 5)


@pytest.mark.parametrize("fields", [{}, {"antialias": False}, {"resize": "letterbox"}])
def test_an_image_of_the_right_size_is_not_resized(fields: dict[str, Any]) -> None:
    image = drawn(noise, 0, (4, 6))
    spec = InputSpec(height=4, width=6, interpolation="bicubic", **fields)
    assert np.array_equal(resize(image, spec), np.asarray(image))
    assert is_unchanged((4, 6, 3), spec)


positions = st.integers(1, 70)
channel_levels = st.integers(0, 255)


@st.composite
def resizes(draw: st.DrawFn) -> InputSpec:
    """Draw any way to resize."""
    color: Any = draw(st.sampled_from(["RGB", "BGR", "L"]))
    height, width = draw(positions), draw(positions)
    mode: Any = draw(st.sampled_from(["stretch", "shorter_side", "letterbox"]))
    resize_to: Any = {
        "stretch": st.none() | st.tuples(positions, positions),
        "shorter_side": positions if height != width else st.none() | positions,
        "letterbox": st.none(),
    }[mode]
    interpolation: Any = draw(st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]))
    channels: Any = 1 if color == "L" else 3
    return InputSpec(
        height=height,
        width=width,
        channels=channels,
        color=color,
        resize=mode,
        resize_to=draw(resize_to),
        crop_offset=draw(st.sampled_from(["round", "floor"])),
        interpolation=interpolation,
        antialias=interpolation == "lanczos" or draw(st.booleans()),
        fill=draw(st.tuples(*[channel_levels] * channels) | channel_levels),
    )


sizes = st.tuples(positions, positions) | st.tuples(st.just(1), st.integers(1, 600))
either_way = sizes.flatmap(lambda size: st.sampled_from([size, size[::-1]]))


@given(spec=resizes(), size=either_way, seed=st.integers(0, 99))
def test_every_image_gets_the_shape_of_the_input(spec: InputSpec, size: tuple[int, int], seed: int) -> None:
    image = drawn(noise, seed, size)
    pixels = resize(image, spec)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (spec.height, spec.width, spec.channels)
    gray = np.asarray(image.convert("L"))[..., None]
    for before in (np.asarray(image), gray):
        if is_unchanged(before.shape, spec):
            assert np.array_equal(pixels, before)
    size = (spec.height, spec.width)
    assert is_unchanged(pixels.shape, spec) == (spec.resize_to in (None, size, min(size)))


@given(spec=resizes(), size=either_way, level=channel_levels)
def test_an_image_of_one_color_stays_so(spec: InputSpec, size: tuple[int, int], level: int) -> None:
    constant = Image.new("RGB", size, (level,) * 3)
    same_fill = msgspec.structs.replace(spec, fill=level)
    assert (resize(constant, same_fill) == level).all()


@settings(max_examples=300)
@given(spec=resizes(), size=either_way, seed=st.integers(0, 99))
def test_undo_crop_returns_images_that_are_resized_to_the_same_pixels(
    spec: InputSpec, size: tuple[int, int], seed: int
) -> None:
    pixels = resize(drawn(noise, seed, size), spec)
    [image] = undo_crop(pixels[None], spec)
    again = resize(Image.fromarray(image[..., 0] if spec.channels == 1 else image).convert("RGB"), spec)
    if isinstance(spec.resize_to, int) and spec.resize_to < min(spec.height, spec.width):
        # The rows that the crop pads are lost.
        assert (again == pixels).all(axis=(1, 2)).sum() >= spec.resize_to
    else:
        assert np.array_equal(again, pixels)


def test_undo_crop_changes_nothing_where_nothing_is_cropped() -> None:
    pixels = np.zeros((2, 4, 6, 3), np.uint8)
    assert undo_crop(pixels, InputSpec(height=4, width=6)) is pixels
    assert undo_crop(pixels, InputSpec(height=4, width=6, resize="letterbox")) is pixels


def test_channels_come_first_in_rgb_order() -> None:
    pixels = np.zeros((1, 2, 3, 3), np.uint8)
    pixels[0, 1, 2] = (255, 51, 0)
    batch = normalize(pixels, InputSpec(height=2, width=3))
    assert batch.shape == (1, 3, 2, 3)
    assert batch[0, :, 1, 2].tolist() == [1, np.float32(0.2), 0]
    assert np.count_nonzero(batch) == 2


def test_the_channels_of_a_bgr_network_are_reversed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    spec = InputSpec(height=4, width=6, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    reversed_spec = InputSpec(height=4, width=6, color="BGR", mean=CIFAR10_MEAN[::-1], std=CIFAR10_STD[::-1])
    assert bitwise_equal(normalize(pixels, reversed_spec), np.ascontiguousarray(normalize(pixels, spec)[:, ::-1]))


@pytest.mark.parametrize("color", ["RGB", "BGR", "L"])
def test_the_channels_of_an_nhwc_network_come_last(color: Any) -> None:
    channels: Any = 1 if color == "L" else 3
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, channels), np.uint8)
    first = InputSpec(
        height=4, width=6, channels=channels, color=color, mean=CIFAR10_MEAN[:channels], std=CIFAR10_STD[:channels]
    )
    last = msgspec.structs.replace(first, layout="NHWC")
    batch = normalize(pixels, last)
    assert batch.flags.c_contiguous
    assert batch.shape[1:] == last.shape
    assert bitwise_equal(batch, np.ascontiguousarray(normalize(pixels, first).transpose(0, 2, 3, 1)))


def test_grayscale_has_one_channel() -> None:
    image = Image.new("RGB", (6, 4), (200, 100, 50))
    spec = InputSpec(height=4, width=6, channels=1, color="L", mean=(0.5,), std=(0.25,))
    batch = preprocess([image], model(spec))
    assert batch.shape == (1, 1, 4, 6)
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert (batch == (np.float32(luma) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).all()


@pytest.mark.parametrize("color", ["RGB", "BGR", "L"])
def test_a_model_with_embedded_preprocessing_gets_whole_images(color: Any) -> None:
    channels: Any = 1 if color == "L" else 3
    spec = InputSpec(
        height=4, width=4, channels=channels, color=color, resize="shorter_side", resize_to=5, layout="NHWC"
    )
    embedded = msgspec.structs.replace(model(spec), embedded_preprocessing=True)
    image = drawn(noise, 0, (9, 7))
    expected = np.asarray(image if channels == 3 else image.convert("L")).reshape(9, 7, channels)
    assert np.array_equal(model_pixels(image, embedded), expected)
    # It resizes and crops pixels of its input size too, so these are extended first.
    assert model_input(resize(image, spec)[None], embedded).shape == (1, 5, 5, channels)


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
