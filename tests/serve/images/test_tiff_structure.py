"""Ordinary TIFF files; those that cost more than they declare are in `test_inner_sizes`."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from cifarx_serve.images.reader import read_image


@pytest.mark.parametrize("compression", ["raw", "tiff_adobe_deflate", "packbits"])
def test_a_strip_may_be_larger_than_the_image(compression: str) -> None:
    """Programs declare strips of any number of rows."""
    image = Image.effect_mandelbrot((50, 30), (-2, -1.5, 1, 1.5), 100).convert("L")
    file = io.BytesIO()
    image.save(file, "TIFF", compression=compression, tiffinfo={TiffImagePlugin.ROWSPERSTRIP: 2**31 - 1})
    assert np.array_equal(np.asarray(read_image(file.getvalue()))[..., 0], np.asarray(image))
