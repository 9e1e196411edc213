"""The candidates, by what they do to images."""

import msgspec
import numpy as np
import pytest

from cifarx_export.diagnosis.candidates import (
    cropped,
    geometries,
    geometry,
    refinements,
    scaling_name,
    unit_scaling,
)
from cifarx_export.parity.scalings import SCALINGS, scaled
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import InputSpec
from cifarx_train.models.preprocessing import Preprocessing

SPEC = InputSpec(height=224, width=224)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)


def test_the_usual_ones_contain_the_usual_preprocessing_of_imagenet() -> None:
    imagenet = next(scaling for scaling in SCALINGS if scaling.name.startswith("ImageNet"))
    assert Preprocessing.imagenet() in [scaled(size, imagenet, "RGB") for size in geometries(SPEC)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=[scaling.name for scaling in SCALINGS])
def test_a_scaling_of_values_from_0_to_1_has_the_same_effect(scaling: object) -> None:
    spec = scaled(SPEC, scaling, "RGB")  # type: ignore[arg-type]
    mean, std = unit_scaling(spec)
    unit = msgspec.structs.replace(spec, value_range=(0.0, 1.0), mean=mean, std=std)
    np.testing.assert_allclose(normalize(PIXELS, unit), normalize(PIXELS, spec), rtol=1e-4, atol=1e-4)


def test_every_scaling_is_another_one_and_has_a_name() -> None:
    inputs = [scaled(SPEC, scaling, "RGB") for scaling in SCALINGS]
    assert [scaling_name(one, SCALINGS) for one in inputs] == [scaling.name for scaling in SCALINGS]
    assert scaling_name(msgspec.structs.replace(SPEC, value_range=(-1.0, 1.0)), SCALINGS) == "-1 to 1"
    assert scaling_name(msgspec.structs.replace(SPEC, mean=(0.1, 0.2, 0.3)), SCALINGS) == (
        "0 to 1, mean 0.1 0.2 0.3, std 1"
    )


def test_a_crop_is_of_the_usual_size() -> None:
    assert cropped(SPEC, 0.875).resize_to == 256
    assert cropped(InputSpec(height=160, width=200), 1.0).resize_to == 160


def test_the_geometry_does_not_depend_on_the_scaling() -> None:
    shapes = {geometry(scaled(SPEC, scaling, color)) for scaling in SCALINGS for color in ("RGB", "BGR")}
    assert len(shapes) == 1
    assert len({geometry(size) for size in geometries(SPEC)}) == 3


def test_refinements_are_different_and_keep_the_scaling() -> None:
    spec = cropped(scaled(SPEC, SCALINGS[1], "BGR"), 0.875)
    found = list(refinements(spec))
    assert {(one.mean, one.color, one.resize) for one in found} == {(spec.mean, "BGR", "shorter_side")}
    assert {one.interpolation for one in found} == {"nearest", "bilinear", "bicubic", "lanczos"}
    assert {one.resize_to for one in found} == {224, 236, 249, 256}
    assert {one.antialias for one in found} == {True, False}


def test_gray_images_have_the_mean_of_the_colors() -> None:
    gray = scaled(InputSpec(height=28, width=28, channels=1, color="L"), SCALINGS[1], "L")
    assert gray.mean == pytest.approx((0.449,))
