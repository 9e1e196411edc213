"""The usual scalings, by what they do to images."""

import numpy as np
import pytest

from cifarx_export.parity.scalings import SCALINGS, data_scaling, scaled
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import InputSpec

SPEC = InputSpec(height=224, width=224)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)


@pytest.mark.parametrize("scaling", SCALINGS, ids=[scaling.name for scaling in SCALINGS])
def test_a_scaling_in_the_other_order_of_colors_normalizes_each_color_alike(scaling: object) -> None:
    rgb, bgr = (normalize(PIXELS, scaled(SPEC, scaling, color)) for color in ("RGB", "BGR"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(bgr, rgb[:, ::-1])


def test_the_scaling_of_the_data_standardizes_it() -> None:
    spec = scaled(SPEC, data_scaling(PIXELS), "RGB")
    normalized = normalize(PIXELS, spec)
    np.testing.assert_allclose(normalized.mean((0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(normalized.std((0, 2, 3)), 1, atol=1e-3)
