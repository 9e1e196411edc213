import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.image_format import FORMATS_VARIABLE
from cifarx_serve.images.reader import MAX_PIXELS, read_image

ORIENTATION = 0x0112
PIXELS = np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def decoded(source: Any) -> NDArray[np.uint8]:
    image = read_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def over_white(rgba: NDArray[np.uint8]) -> NDArray[np.float64]:
    alpha = rgba[..., 3:] / 255
    whitened: NDArray[np.float64] = rgba[..., :3] * alpha + 255 * (1 - alpha)
    return whitened


LOSSLESS = {
    "PNG": encoded(PICTURE, "PNG"),
    "BMP": encoded(PICTURE, "BMP"),
    "TIFF": encoded(PICTURE, "TIFF"),
    "TIFF, LZW": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "WebP": encoded(PICTURE, "WEBP", lossless=True),
    "PPM": encoded(PICTURE, "PPM"),
}
# The variants of each format for which its decoder has separate code, some with metadata.
WHOLE = {
    **LOSSLESS,
    "PNG with EXIF": encoded(PICTURE, "PNG", exif=oriented(6)),
    "PNG with a palette": encoded(PICTURE.quantize(16), "PNG", transparency=3),
    "PNG with alpha": encoded(PICTURE.convert("RGBA"), "PNG"),
    "PNG of 16 bits": encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "JPEG with EXIF": encoded(PICTURE, "JPEG", exif=oriented(6)),
    "JPEG, progressive": encoded(PICTURE, "JPEG", progressive=True),
    "JPEG of CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "GIF": encoded(PICTURE.quantize(16), "GIF", transparency=2),
    "GIF, animated": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
    "BMP with a palette": encoded(PICTURE.quantize(16), "BMP"),
    "TIFF with EXIF": encoded(PICTURE, "TIFF", exif=oriented(6)),
    "TIFF, deflated": encoded(PICTURE.convert("RGBA"), "TIFF", compression="tiff_deflate"),
    "TIFF, fax": encoded(PICTURE.convert("1"), "TIFF", compression="group4"),
    "WebP with EXIF": encoded(PICTURE, "WEBP", exif=oriented(6)),
    "WebP, animated": encoded(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)]),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats(kind: str) -> None:
    assert np.array_equal(decoded(LOSSLESS[kind]), PIXELS)


def test_jpeg_equals_pillow() -> None:
    data = encoded(PICTURE, "JPEG", quality=80)
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(decoded(data), np.asarray(expected))


def test_every_kind_of_source_has_the_same_result(tmp_path: Path) -> None:
    path = tmp_path / "a picture without a suffix"
    path.write_bytes(LOSSLESS["PNG"])
    with Image.open(path) as opened:
        for source in (path, str(path), LOSSLESS["PNG"], PICTURE, opened, PIXELS):
            assert np.array_equal(decoded(source), PIXELS)


@given(arrays.arrays(np.uint8, (3, 4)))
def test_grayscale(levels: NDArray[np.uint8]) -> None:
    assert np.array_equal(decoded(encoded(Image.fromarray(levels), "PNG")), np.stack([levels] * 3, axis=2))


def test_black_and_white() -> None:
    bits = np.array([[True, False], [False, True]])
    expected = np.where(bits, 255, 0)
    assert np.array_equal(decoded(encoded(Image.fromarray(bits), "PNG"))[..., 1], expected)


@pytest.fixture
def palette() -> Image.Image:
    """Return a red, a green and a blue pixel as palette indices."""
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


def test_palette(palette: Image.Image) -> None:
    assert decoded(encoded(palette, "PNG")).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


@pytest.mark.parametrize("format_name", ["PNG", "GIF"])
def test_palette_with_one_transparent_color(palette: Image.Image, format_name: str) -> None:
    data = encoded(palette, format_name, transparency=1)
    assert decoded(data).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_palette_with_alpha_per_color(palette: Image.Image) -> None:
    data = encoded(palette, "PNG", transparency=bytes([0, 255, 51]))
    assert decoded(data).tolist() == [[[255, 255, 255], [0, 255, 0], [204, 204, 255]]]


def test_palette_with_alpha_per_pixel(palette: Image.Image) -> None:
    image = palette.convert("PA")
    image.putalpha(Image.fromarray(np.array([[255, 0, 51]], np.uint8)))
    assert image.mode == "PA"
    assert decoded(image).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 255]]]


@given(arrays.arrays(np.uint8, (3, 4, 4)), st.sampled_from(["PNG", "TIFF", "array"]))
def test_color_with_alpha_is_blended_with_white(rgba: NDArray[np.uint8], way: str) -> None:
    picture = decoded(rgba if way == "array" else encoded(Image.fromarray(rgba), way))
    assert np.abs(picture - over_white(rgba)).max() <= 1


@given(arrays.arrays(np.uint8, (3, 4, 2)))
def test_grayscale_with_alpha_is_blended_with_white(gray: NDArray[np.uint8]) -> None:
    data = encoded(Image.fromarray(gray, "LA"), "PNG")
    assert np.abs(decoded(data) - over_white(gray[..., [0, 0, 0, 1]])).max() <= 1


@pytest.mark.parametrize(("mode", "key"), [("RGB", (10, 20, 30)), ("L", 10)])
def test_one_transparent_color_without_a_palette(mode: str, key: Any) -> None:
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), key)
    assert decoded(encoded(image, "PNG", transparency=key)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(("mode", "format_name"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_16_bit_grayscale_is_scaled(mode: str, format_name: str) -> None:
    levels = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], np.uint16)
    image = Image.frombytes(mode, (6, 1), levels.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    assert decoded(encoded(image, format_name))[0, :, 2].tolist() == [0, 0, 1, 0x12, 0x80, 0xFF]


def test_16_bit_grayscale_in_a_32_bit_mode_is_scaled() -> None:
    """Pillow opens such a PGM file in mode I, and would clip it when converting it to RGB."""
    data = b"P5 4 1 65535\n" + np.array([0, 256, 0x1234, 0xFFFF], ">u2").tobytes()
    assert decoded(data)[0, :, 0].tolist() == [0, 1, 0x12, 0xFF]


def test_cmyk() -> None:
    image = Image.new("CMYK", (4, 1))
    image.putdata([(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)])
    assert decoded(encoded(image, "TIFF")).tolist() == [[[255, 255, 255], [0, 255, 255], [255, 255, 0], [0, 0, 0]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "LA", "RGBX"])
def test_a_pillow_image_of_any_mode_becomes_rgb(mode: str) -> None:
    assert decoded(Image.new(mode, (3, 2))).shape == (2, 3, 3)


UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_exif_orientation_is_applied(orientation: int, format_name: str) -> None:
    options = {"lossless": True} if format_name == "WEBP" else {}
    data = encoded(PICTURE, format_name, exif=oriented(orientation), **options)
    assert np.array_equal(decoded(data), UPRIGHT[orientation](PIXELS))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_exif_orientation_of_a_jpeg_is_applied(orientation: int) -> None:
    """Blocks of 16 pixels survive JPEG almost unchanged."""
    blocks = np.kron(PIXELS[:2, :3], np.ones((16, 16, 1), np.uint8))
    data = encoded(Image.fromarray(blocks), "JPEG", quality=100, subsampling=0, exif=oriented(orientation))
    expected = UPRIGHT[orientation](blocks)
    assert decoded(data).shape == expected.shape
    assert np.abs(decoded(data).astype(int) - expected).max() <= 4


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_exif_orientation_is_applied_only_once(orientation: int) -> None:
    once = read_image(encoded(PICTURE, "PNG", exif=oriented(orientation)))
    assert np.array_equal(decoded(once), np.asarray(once))


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_the_exif_orientation_of_an_opened_image_is_applied(format_name: str) -> None:
    with Image.open(io.BytesIO(encoded(PICTURE, format_name, exif=oriented(6)))) as opened:
        assert np.array_equal(decoded(opened), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_an_invalid_exif_orientation_is_ignored(orientation: int) -> None:
    assert np.array_equal(decoded(encoded(PICTURE, "PNG", exif=oriented(orientation))), PIXELS)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_the_exif_orientation_is_applied_in_other_modes(mode: str) -> None:
    image = PICTURE.convert(mode)
    data = encoded(image, "PNG", exif=oriented(6))
    assert np.array_equal(decoded(data), np.rot90(np.asarray(image.convert("RGB")), -1))


def test_transparency_is_kept_when_the_orientation_is_applied() -> None:
    image = Image.new("L", (2, 1), 10)
    image.putpixel((1, 0), 0)
    assert decoded(encoded(image, "PNG", transparency=0, exif=oriented(6)))[..., 0].tolist() == [[10], [255]]


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_uses_the_first_frame_of_an_animation(format_name: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format_name == "WEBP" else {}
    data = encoded(frames[0], format_name, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    assert np.array_equal(decoded(data), np.asarray(frames[0]))


@given(st.data())
def test_a_truncated_file_is_decoded_or_an_image_error(data: st.DataObject) -> None:
    whole = WHOLE[data.draw(st.sampled_from(sorted(WHOLE)))]
    cut = data.draw(st.integers(0, len(whole) - 1))
    try:
        read_image(whole[:cut])
    except ImageError as error:
        assert "\n" not in str(error)


@given(st.data())
def test_a_damaged_file_is_decoded_or_an_image_error(data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[data.draw(st.sampled_from(sorted(WHOLE)))])
    # Damage the header more often than the pixels.
    places = st.integers(0, min(120, len(damaged) - 1)) | st.integers(0, len(damaged) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        damaged[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    try:
        image = read_image(bytes(damaged))
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"


@pytest.mark.parametrize("kind", WHOLE)
def test_half_a_file_is_refused(kind: str) -> None:
    whole = encoded(PICTURE.resize((90, 70)), "GIF") if kind.startswith("GIF") else WHOLE[kind]
    assert read_image(whole).mode == "RGB"
    with pytest.raises(ImageError):
        read_image(whole[: len(whole) // 2])


def test_the_error_of_half_a_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "torn.png"
    path.write_bytes(LOSSLESS["PNG"][:300])
    with pytest.raises(ImageError) as raised:
        read_image(path)
    assert raised.value.problem.startswith(f"{path} is truncated or damaged")


def test_a_truncated_file_behind_a_pillow_image() -> None:
    """Pillow can open it by its header, and fails only when it loads the pixels."""
    with Image.open(io.BytesIO(LOSSLESS["PNG"][:300])) as opened, pytest.raises(ImageError, match="truncated"):
        read_image(opened)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS works only on Linux")
def test_an_image_without_memory_for_it_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (9000, 9000)).save(path, compress_level=1)
    code = """
import re, resource, sys
from cifarx_serve.errors import ImageError
from cifarx_serve.images.reader import read_image
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), used + (40 << 20)))
try:
    read_image(sys.argv[1])
except ImageError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{path} needs more memory than there is: resize the image first\n", ran.stderr


def test_damaged_metadata_is_ignored() -> None:
    """The EXIF data should have five entries and have none. Pillow warns, but the pixels are intact."""
    damaged = encoded(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    assert np.array_equal(decoded(damaged), decoded(encoded(PICTURE, "JPEG")))


def test_damaged_metadata_does_not_hide_the_orientation() -> None:
    """The camera maker is a number. Pillow can read such EXIF data but not write them."""
    entries = b"\x01\x0f\0\x0b\0\0\0\x01abcd" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    damaged = encoded(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + b"\0\0\0\0")
    assert np.array_equal(decoded(damaged), np.rot90(decoded(encoded(PICTURE, "JPEG")), -1))


def test_an_exception_that_only_one_decoder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORMATS_VARIABLE, "DDS")
    damaged = bytearray(encoded(PICTURE, "DDS"))
    damaged[80:84] = struct.pack("<I", 1)
    with pytest.raises(NotImplementedError), Image.open(io.BytesIO(damaged)) as opened:
        opened.load()
    with pytest.raises(ImageError, match="truncated or damaged"):
        read_image(bytes(damaged))


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"this is no picture\n", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"])
def test_a_file_that_is_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as raised:
        read_image(path)
    assert str(path) in raised.value.problem
    with pytest.raises(ImageError, match=f"^{len(content)} bytes"):
        read_image(content)


def test_a_missing_file() -> None:
    with pytest.raises(ImageError, match=r"cannot open image absent\.png \(No such file"):
        read_image("absent.png")


@pytest.mark.parametrize("path", ["", "x" * 300, "nul\0byte.png", "file/below.png"])
def test_an_invalid_path(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError):
        read_image(path)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read any file")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(LOSSLESS["PNG"])
    path.chmod(0)
    with pytest.raises(ImageError, match="make it readable"):
        read_image(path)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file that ends before its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (1, MAX_PIXELS + 1), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_over_the_limit_is_refused_by_its_header(size: tuple[int, int]) -> None:
    """The file has no pixels, so decoding it would fail with another error."""
    with pytest.raises(ImageError) as raised:
        read_image(png_header(*size) + struct.pack(">I", 5) + b"IDAT")
    assert f"over the limit of {MAX_PIXELS:,} pixels" in raised.value.problem
    assert "resize" in raised.value.remedy


def test_pillow_does_not_warn_about_images_below_our_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS.size // 3 - 1)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(io.BytesIO(LOSSLESS["PNG"])):
        pass
    assert np.array_equal(decoded(LOSSLESS["PNG"]), PIXELS)


def test_arrays_can_be_noncontiguous() -> None:
    assert np.array_equal(decoded(PIXELS[::2, ::-3]), PIXELS[::2, ::-3])
    assert np.array_equal(decoded(PIXELS[..., 1].T), np.stack([PIXELS[..., 1].T] * 3, axis=2))


def test_grayscale_arrays_can_have_an_axis_of_channels() -> None:
    assert np.array_equal(decoded(PIXELS[..., 1:2]), decoded(PIXELS[..., 1]))


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(np.float32),
        PIXELS.astype(np.int64),
        PIXELS > 7,
        PIXELS[None],
        PIXELS[0, 0],
        PIXELS[..., :2],
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)
def test_an_array_of_a_wrong_shape_or_dtype_is_refused(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError) as raised:
        read_image(array)
    assert f"shape {array.shape} and dtype {array.dtype}" in raised.value.problem
    assert "(H, W, 3)" in raised.value.remedy


@pytest.mark.parametrize(
    "source", [np.zeros((0, 5), np.uint8), np.zeros((5, 0, 3), np.uint8), Image.new("RGB", (0, 3))]
)
def test_an_empty_image_is_refused(source: Any) -> None:
    with pytest.raises(ImageError, match=r"the image is empty \(\dx\d pixels\): give an image that has pixels"):
        read_image(source)


def test_postscript_is_refused_before_it_is_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "x.eps")
    with pytest.raises(ImageError, match="EPS"):
        read_image(tmp_path / "x.eps")


def test_decoding_in_threads_restores_the_warning_filters() -> None:
    """Damaged EXIF data make Pillow warn. All threads of a process share the warning filters."""
    damaged = encoded(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda _: read_image(damaged).size, range(400)))
    assert len(pictures) == 400
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="still shown"):
        warnings.warn("still shown", stacklevel=1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes need POSIX")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_named_pipe_is_read_like_a_file(tmp_path: Path, suffix: str) -> None:
    """A pipe, as in `cifarx infer <(curl ...)`, cannot be rewound."""
    Image.new("RGB", (5, 4), "navy").save(tmp_path / f"whole.{suffix}")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(pipe.write_bytes, (tmp_path / f"whole.{suffix}").read_bytes())
        image = read_image(pipe)
        writing.result()
    assert image.tobytes() == read_image(tmp_path / f"whole.{suffix}").tobytes()
