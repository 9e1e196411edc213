import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.reader import read_image

SHAPE = (3, 5)


def read_tiff(values: NDArray[np.generic], **options: int) -> NDArray[np.uint8]:
    """Write values as a grayscale TIFF file, read it, and return its levels, which are those of every channel."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", **options)
    pixels = np.asarray(read_image(file.getvalue()))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@given(arrays.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)))
def test_numbers_from_0_to_1_are_scaled(values: NDArray[np.float32]) -> None:
    assert np.abs(read_tiff(values) - values * 255.0).max() <= 0.5001


@given(arrays.arrays(np.float32, SHAPE, elements=st.floats(0, 255, width=32)))
def test_numbers_from_0_to_255_are_levels(values: NDArray[np.float32]) -> None:
    values[0, 0] = 2.0
    assert np.abs(read_tiff(values) - values).max() < 1


@given(arrays.arrays(np.int32, SHAPE, elements=st.integers(0, 255)))
def test_small_integers_of_32_bits_are_levels(values: NDArray[np.int32]) -> None:
    assert (read_tiff(values) == values).all()


@given(
    arrays.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)),
    st.floats(width=32).filter(lambda number: not 0 <= number <= 255),
)
def test_numbers_of_another_range_are_refused(values: NDArray[np.float32], number: float) -> None:
    values[1, 2] = number
    with pytest.raises(ImageError, match=r"floating-point numbers (from|that are not finite)"):
        read_tiff(values)


@given(st.integers(-(1 << 31), (1 << 31) - 1).filter(lambda number: not 0 <= number <= 255))
def test_large_and_negative_integers_are_refused(number: int) -> None:
    values = np.zeros(SHAPE, np.int32)
    values[1, 2] = number
    with pytest.raises(ImageError, match=r"integers from .*: scale it to 0 to 255, or save it as a 16-bit PNG"):
        read_tiff(values)


def test_the_error_states_the_range() -> None:
    values = np.linspace(-3.5, 1200, 15, dtype=np.float32).reshape(SHAPE)
    with pytest.raises(ImageError, match=r"numbers from -3\.5 to 1200, of which none is known to be white: scale it"):
        read_tiff(values)


@given(arrays.arrays(np.uint16, SHAPE))
def test_integers_of_16_bits_lose_their_lower_bits(values: NDArray[np.uint16]) -> None:
    assert (read_tiff(values) == values >> 8).all()


def test_integers_of_12_bits_lose_their_lower_bits() -> None:
    """Pillow reads such TIFF files, in which two pixels share three bytes, but does not write them."""
    packed = bytes([0x12, 0x3F, 0xFF])  # 0x123 and 0xFFF
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1), (279, 4, 3)]
    head = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little")
    for tag, kind, value in tags:
        head += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
        head += value.to_bytes(4, "little")
    pixels = np.asarray(read_image(head.ljust(200, b"\0") + packed))
    assert pixels[0, :, 0].tolist() == [0x12, 0xFF]


def test_the_orientation_of_the_camera_is_applied() -> None:
    values = np.linspace(0, 1, 15, dtype=np.float32).reshape(SHAPE)
    file = io.BytesIO()
    image = Image.fromarray(values)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, "TIFF", exif=exif)
    levels = np.asarray(read_image(file.getvalue()))[..., 0]
    assert (levels == np.rot90((values * 255).round(), -1)).all()


def test_kinds_of_pixels_that_pillow_does_not_read_are_refused_by_one_line() -> None:
    """Three channels of 32-bit floating-point numbers."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 180), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 200)]
    tags += [(277, 3, 1, 3), (279, 4, 1, 12), (339, 3, 3, 190)]
    head = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little")
    for tag, kind, count, value in tags:
        head += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little")
        head += value.to_bytes(4, "little")
    content = head.ljust(180, b"\0") + b"\x20\0" * 3 + b"\0\0\0\0" + b"\x03\0" * 3 + b"\0\0\0\0" + bytes(12)
    with pytest.raises(ImageError, match="has pixels of a kind that Pillow does not read: save it with 8 bits"):
        read_image(content)
