import io

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.images.image_format import (
    FILE_FORMATS,
    FORMATS,
    FORMATS_VARIABLE,
    HEAD_BYTES,
    identify,
    missing_reader,
    reader,
)
from cifarx_serve.images.reader import open_image, read_image
from tests.support.asgi_client import encode_image

PICTURE = Image.new("RGB", (16, 16), "teal")
OTHERS = ("ICNS", "ICO", "JPEG2000", "DDS", "SGI", "QOI")


def encode(image_format: str) -> bytes:
    """Return the picture in a format; Pillow does not write HEIC itself."""
    if image_format != "HEIC":
        return encode_image(PICTURE, image_format)
    file = io.BytesIO()
    pillow_heif.from_pillow(PICTURE).save(file, quality=95)
    return file.getvalue()


@pytest.mark.parametrize("image_format", [*FILE_FORMATS, *OTHERS])
def test_files_that_pillow_writes_are_recognized(image_format: str) -> None:
    assert identify(encode(image_format)[:HEAD_BYTES]) == image_format


@pytest.mark.parametrize(
    ("head", "image_format"),
    [(b"\0\0\0\x18ftypheic", "HEIC"), (b"%!PS-Adobe-3.0", "EPS"), (b"<svg xmlns", "SVG"), (b"RIFF1234WAVE", None)],
)
def test_files_of_other_programs(head: bytes, image_format: str | None) -> None:
    assert identify(head) == image_format
    assert identify(b"") is None


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_promised_formats_are_opened(image_format: str) -> None:
    data = encode(image_format)
    assert open_image(data).size == read_image(data).size == (16, 16)
    assert isinstance(open_image(data), reader(image_format))


@pytest.mark.parametrize("image_format", [name for name in FILE_FORMATS if name not in FORMATS])
def test_formats_of_files_are_opened_except_from_clients(image_format: str) -> None:
    data = encode(image_format)
    pixel = np.array(read_image(data).getpixel((0, 0)))
    assert np.abs(pixel - PICTURE.getpixel((0, 0))).max() <= 3
    with pytest.raises(ImageError, match=f"{image_format} images are not accepted"):
        open_image(data)


@pytest.mark.parametrize("image_format", ["AVIF", "HEIC"])
def test_the_size_of_a_photograph_is_checked_before_it_is_decoded(
    image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(image_format)
    monkeypatch.setattr("cifarx_serve.images.reader.MAX_PIXELS", 255)
    monkeypatch.setattr(reader(image_format), "load", pytest.fail)
    with pytest.raises(ImageError, match="over the limit of 255 pixels"):
        read_image(data)


@pytest.mark.parametrize(("image_format", "remedy"), [("HEIC", "install pillow-heif"), ("AVIF", "install Pillow 11.3")])
def test_a_missing_reader_is_named(image_format: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(image_format)
    missing_reader.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    try:
        with pytest.raises(ImageError, match=f"no reader of {image_format} images is installed: {remedy}"):
            read_image(data)
    finally:
        missing_reader.cache_clear()


@pytest.mark.parametrize("image_format", OTHERS)
def test_other_formats_are_refused_by_name_unless_the_variable_names_them(
    image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(image_format)
    for open_or_read in (open_image, read_image):
        with pytest.raises(ImageError) as refused:
            open_or_read(data)
        assert str(refused.value) == (
            f"{len(data)} bytes cannot be opened, because {image_format} images are not accepted: "
            "give a JPEG, PNG, WebP, BMP, TIFF or GIF file"
        )
    monkeypatch.setenv(FORMATS_VARIABLE, f"PCX, {image_format.lower()}")
    assert read_image(open_image(data)).mode == "RGB"
    with pytest.raises(ImageError, match="over the limit of 255 pixels"):
        open_image(data, max_pixels=255)


def test_the_variable_names_a_format_that_has_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_image(PICTURE, "TGA")
    with pytest.raises(ImageError, match="is not an image"):
        open_image(data)
    monkeypatch.setenv(FORMATS_VARIABLE, "TGA")
    assert open_image(data).format == "TGA"
    with pytest.raises(ImageError, match="is not an image"):
        open_image(b"this is no picture")


@pytest.mark.parametrize("name", ["EPS", "NONSENSE", "HEIC"])
def test_the_variable_cannot_name_programs_or_unknown_formats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORMATS_VARIABLE, f"ICNS,{name}")
    with pytest.raises(
        UsageError, match=f"{FORMATS_VARIABLE} names '{name}', which cannot be opened: choose from AVIF"
    ):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    assert read_image(encode_image(PICTURE, "PNG")).size == (16, 16)


def test_only_the_reader_of_the_format_sees_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image.open would ask every reader, and some of them decode a part of the file to answer."""
    monkeypatch.setattr(Image, "open", pytest.fail)
    assert read_image(io.BytesIO(encode_image(PICTURE, "TIFF")).getvalue()).size == (16, 16)
