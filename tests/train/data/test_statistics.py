from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import InputSpec
from cifarx_train.data.statistics import fit_normalization

ranges = st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.5, 2.5)])


@given(
    count=st.integers(1, 12),
    height=st.integers(1, 9),
    width=st.integers(2, 9),
    spread=st.integers(20, 255),
    value_range=ranges,
    seed=st.integers(0, 2**31),
)
def test_normalized_inputs_have_mean_zero_and_deviation_one(
    count: int, height: int, width: int, spread: int, value_range: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, spread + 1, (count, height, width, 3), dtype=np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, spread  # some deviation in every channel
    plain = InputSpec(height=height, width=width, value_range=value_range)
    spec = fit_normalization(plain, images)
    exact = normalize(images, plain).astype(np.float64)
    np.testing.assert_allclose(spec.mean, exact.mean((0, 2, 3)), atol=5.1e-5, rtol=1e-6)
    np.testing.assert_allclose(spec.std, exact.std((0, 2, 3)), atol=5.1e-5, rtol=1e-6)
    inputs = normalize(images, spec).astype(np.float64)
    smallest = exact.std((0, 2, 3)).min()
    np.testing.assert_allclose(inputs.mean((0, 2, 3)), 0, atol=1e-4 / smallest)
    np.testing.assert_allclose(inputs.std((0, 2, 3)), 1, atol=1e-4 / smallest)


def test_the_rest_of_the_spec_is_not_changed() -> None:
    plain = InputSpec(height=4, width=6, interpolation="lanczos", value_range=(-1.0, 1.0))
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    spec = fit_normalization(plain, images)
    assert msgspec.structs.replace(spec, mean=plain.mean, std=plain.std) == plain
    assert plain.mean == (0.0, 0.0, 0.0)


def test_grayscale_images_have_one_mean_and_deviation() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 1), dtype=np.uint8)
    plain = InputSpec(height=4, width=6, channels=1, color="L")
    spec = fit_normalization(plain, images)
    assert spec.mean == (round(float(images.mean()) / 255, 4),)
    assert spec.std == (round(float(images.std()) / 255, 4),)
    assert normalize(images, spec).mean() == pytest.approx(0, abs=1e-3)


def test_the_statistics_are_in_the_order_of_the_color() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), dtype=np.uint8)
    images[..., 0] //= 2
    rgb, bgr = (fit_normalization(InputSpec(height=4, width=6, color=color), images) for color in ("RGB", "BGR"))
    assert (bgr.mean, bgr.std) == (rgb.mean[::-1], rgb.std[::-1])
    assert rgb.mean[0] < rgb.mean[2]


@pytest.mark.parametrize("level", [0, 17, 255])
def test_a_channel_without_deviation_has_a_std_of_one(level: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    images[..., 1] = level
    spec = fit_normalization(InputSpec(height=4, width=6), images)
    assert spec.std[1] == 1.0
    assert spec.std[0] != 1.0 != spec.std[2]
    assert spec.mean[1] == round(level / 255, 4)
    assert np.isfinite(normalize(images, spec)).all()
    assert np.abs(normalize(images, spec)[:, 1]).max() < 1e-4


def test_a_single_pixel() -> None:
    spec = fit_normalization(InputSpec(height=1, width=1), np.array([[[[0, 51, 255]]]], np.uint8))
    assert (spec.mean, spec.std) == ((0.0, 0.2, 1.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("count", [1023, 1024, 1025, 3000])
def test_every_image_is_counted_once(count: int) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    images[-1] = 255  # makes a difference if the last image is not counted
    images[: count // 2] //= 2
    spec = fit_normalization(InputSpec(height=2, width=2), images)
    exact = images.astype(np.float64) / 255
    assert spec.mean == tuple(exact.mean((0, 1, 2)).round(4))
    assert spec.std == tuple(exact.std((0, 1, 2)).round(4))


def test_memory_mapped_images(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    plain = InputSpec(height=4, width=4)
    assert fit_normalization(plain, np.load(tmp_path / "images.npy", mmap_mode="r")) == fit_normalization(plain, images)


def test_the_spec_can_be_stored_as_json() -> None:
    images = np.random.default_rng(2).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    spec = fit_normalization(InputSpec(height=4, width=4), images)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=InputSpec) == spec
