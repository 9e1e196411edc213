import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cifarx_serve.errors import ImageError
from cifarx_serve.images.inner_sizes import MAX_COMPRESSED_CHUNKS, MAX_SCANS
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.images.reader import open_image, read_image
from tests.support.asgi_client import encode_image
from tests.support.hostile_images import decode_bombs, jpeg_of_scans

MAX_PIXELS = 1_000_000
MAX_CPU_S = 0.2

REASONS = {
    "ICNS": "ICNS images are not accepted",
    "ICO": "ICO images are not accepted",
    "JPEG 2000": "JPEG2000 images are not accepted",
    "TIFF tile": "has TIFF tiles of 4096x4096 pixels, over the limit of 1,000,000 pixels",
    "BigTIFF tile": "has TIFF tiles of 4096x4096 pixels, over the limit of 1,000,000 pixels",
    "TIFF tile twice": "has the TIFF tag 322 twice",
    "TIFF tags": "has more than 1,000 TIFF tags",
    "TIFF tags of the same bytes": "has TIFF tags of more bytes than the file",
    "TIFF EXIF directory": "has more than 1,000 TIFF tags",
    "TIFF offsets": "values of the TIFF tag 273",
    "progressive JPEG": "has more than 100 JPEG scans",
    "sequential JPEG": "has more than 100 JPEG scans",
    "JPEG comments": "has more than 26,000 segments",
    "PNG zTXt": "has more than 8 compressed PNG texts",
    "PNG iTXt": "has more than 8 compressed PNG texts",
    "PNG zTXt after the pixels": "has more than 8 compressed PNG texts",
    "PNG chunks": "PNG chunks",
    "GIF comment": "GIF blocks before the first frame",
    "GIF extensions": "GIF blocks before the first frame",
    "GIF stray bytes": "GIF blocks before the first frame",
    "WebP canvas": "is 16383x16383 pixels, over the limit of 1,000,000 pixels",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_small_file_that_takes_much_to_decode_is_refused_at_little_cost(kind: str) -> None:
    data = decode_bombs()[kind]
    started = time.process_time()
    with pytest.raises(ImageError) as refused:
        open_image(data, MAX_PIXELS)
    assert time.process_time() - started < MAX_CPU_S
    assert REASONS[kind] in refused.value.problem
    assert isinstance(refused.value, TooManyPixels) == ("over the limit of 1,000,000 pixels" in refused.value.problem)


@pytest.mark.parametrize("kind", sorted(REASONS.keys() - {"TIFF tile", "BigTIFF tile"}))
def test_files_on_the_disk_are_checked_too(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(decode_bombs()[kind])
    with pytest.raises(ImageError) as refused:
        read_image(path)
    assert refused.value.problem.startswith(str(path))


def test_every_bomb_has_a_reason() -> None:
    assert decode_bombs().keys() == REASONS.keys()


def scanned(image: Image.Image) -> bytes:
    return encode_image(image, "JPEG", progressive=True, quality=95)


def png_with_texts(count: int) -> bytes:
    texts = PngImagePlugin.PngInfo()
    for number in range(count):
        texts.add_text(f"key{number}", "a text " * 1000, zip=True)
    return encode_image(Image.new("RGB", (8, 8)), "PNG", pnginfo=texts)


def test_ordinary_files_are_below_the_limits(dog: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8))
    with Image.open(dog) as opened:
        photograph = opened.convert("RGB")
    exif = Image.Exif()
    exif.update({0x010F: "maker", 0x8769: {0x9286: b"comment" * 5000}})
    profile = {"icc_profile": bytes(range(256)) * 2000}
    options: dict[str, dict[str, Any]] = {
        "PNG": {"exif": exif, **profile},
        "JPEG": {"progressive": True, "exif": exif, "icc_profile": bytes(300_000)},
        "WEBP": {"exif": exif, **profile},
        "TIFF": {"compression": "tiff_lzw", **profile},
        "GIF": {"comment": b"a comment " * 5000},
        "BMP": {},
    }
    for image in (noise, photograph):
        for image_format, saved in options.items():
            assert read_image(encode_image(image, image_format, **saved)).size == image.size


def test_the_number_of_scans_is_exact() -> None:
    """The first scans are those that Pillow writes, of which the last one is repeated."""
    first = scanned(Image.new("L", (1000, 1000), 99)).count(b"\xff\xda") - 1
    assert read_image(jpeg_of_scans(MAX_SCANS - first)).size == (1000, 1000)
    with pytest.raises(ImageError, match="more than 100 JPEG scans"):
        read_image(jpeg_of_scans(MAX_SCANS - first + 1))


def test_bytes_in_a_profile_are_no_scans() -> None:
    profile = b"\xff\xda" * 30_000
    data = encode_image(Image.new("RGB", (8, 8)), "JPEG", progressive=True, icc_profile=profile)
    assert data.count(b"\xff\xda") > 30_000
    assert read_image(data).size == (8, 8)


def test_a_scan_hidden_behind_fill_bytes_and_restart_markers_is_counted() -> None:
    whole = jpeg_of_scans(MAX_SCANS)
    hidden = whole.replace(b"\xff\xda", b"\xff\xd0\xff\xff\xff\xda")
    with pytest.raises(ImageError, match="more than 100 JPEG scans"):
        read_image(hidden)


def test_the_number_of_compressed_texts_is_exact() -> None:
    assert read_image(png_with_texts(MAX_COMPRESSED_CHUNKS)).size == (8, 8)
    with pytest.raises(ImageError, match="more than 8 compressed PNG texts"):
        read_image(png_with_texts(MAX_COMPRESSED_CHUNKS + 1))


def test_texts_that_are_not_compressed_are_not_counted() -> None:
    texts = PngImagePlugin.PngInfo()
    for number in range(50):
        texts.add_itxt(f"key{number}", "a text")
        texts.add_text(f"name{number}", "a text")
    assert read_image(encode_image(Image.new("RGB", (8, 8)), "PNG", pnginfo=texts)).size == (8, 8)
