"""Recognizes the format of an image file by its first bytes, and decides which formats are opened.

Pillow reads more than forty formats. Some of them contain an image of any size in another format behind a small header,
or have readers that few people use. So only a few are opened, and the other readers of Pillow see no file.
"""

import os
from functools import cache
from importlib import import_module
from typing import Final

from PIL import Image
from PIL.ImageFile import ImageFile

from cifarx_serve.errors import ImageError, UsageError

HEAD_BYTES: Final = 16
"""The number of bytes by which a format is recognized."""

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""The formats that are opened wherever they come from, by Pillow's names."""

FILE_FORMATS: Final = (*FORMATS, "PPM", "AVIF", "HEIC")
"""The formats of files and of training data. Datasets use PPM, PGM and PBM, whose pixels follow a few numbers.

AVIF and HEIC are those of cameras and phones; `missing_reader` says whether they can be read. Clients cannot send them,
because only the sizes that they declare are limited, not what their decoders do.
"""

FORMATS_VARIABLE: Final = "CIFARX_IMAGE_FORMATS"
"""The environment variable that names more of Pillow's formats, separated by commas.

Only the size that such an image declares is limited, not the sizes inside the file.
"""

NOT_AN_IMAGE: Final = "give a JPEG, PNG, WebP, BMP, TIFF or GIF file"
"""The remedy in the errors for files that are not opened."""

_READERS: Final = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "PPM": ("PIL.PpmImagePlugin", "PpmImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "HEIC": ("pillow_heif", "HeifImageFile"),
}

# The formats whose reader may be missing: the module that decodes them, and how to get it.
_OPTIONAL_READERS: Final = {
    "AVIF": ("PIL._avif", "install Pillow 11.3 or newer"),
    "HEIC": ("pillow_heif", "install pillow-heif"),
}

# Of the formats that are opened, and of those that are likely to be tried. RIFF and ISO base media files name theirs
# at offset 8.
_SIGNATURES: Final = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    *[(b"P%d" % number, "PPM") for number in range(1, 7)],
    (b"icns", "ICNS"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"8BPS", "PSD"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"\x01\xda", "SGI"),
    (b"/* XPM */", "XPM"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "SVG"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
)
_BRANDS: Final = {
    b"WEBP": "WEBP",
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
}


def identify(head: bytes) -> str | None:
    """Return the format of a file by its first `HEAD_BYTES` bytes, or None if it is not known."""
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    return _BRANDS.get(head[8:12]) if head.startswith(b"RIFF") or head[4:8] == b"ftyp" else None


def require_accepted(head: bytes, name: str, accepted: tuple[str, ...]) -> str | None:
    """Return the format of a file, or None if only `extra_formats` may know it.

    Args:
        head: the first `HEAD_BYTES` bytes of the file.
        name: what to call the file in an error message.
        accepted: the formats that are opened in addition to `extra_formats`.

    Raises:
        ImageError: the file is not an image, its format is not accepted, or its reader is not installed.
        UsageError: as for `extra_formats`.
    """
    found = identify(head)
    if found in accepted:
        if missing := missing_reader(found):
            raise ImageError(f"{name} cannot be opened, because no reader of {found} images is installed", missing)
        return found
    extra = extra_formats()
    if found is None and not extra:
        raise ImageError(f"{name} is not an image", NOT_AN_IMAGE)
    if found is not None and found not in extra:
        raise ImageError(f"{name} cannot be opened, because {found} images are not accepted", NOT_AN_IMAGE)
    return found


def extra_formats() -> tuple[str, ...]:
    """Return the formats that `FORMATS_VARIABLE` names.

    Raises:
        UsageError: Pillow does not read one of them, or would run it as a program.
    """
    value = os.environ.get(FORMATS_VARIABLE, "")
    names = tuple(name.strip().upper() for name in value.split(",") if name.strip())
    if not names:
        return ()
    Image.init()
    if unknown := [name for name in names if name not in Image.OPEN or name == "EPS"]:
        known = ", ".join(sorted(set(Image.OPEN) - {"EPS"}))
        raise UsageError(
            f"{FORMATS_VARIABLE} names {unknown[0][:40]!r}, which cannot be opened", f"choose from {known}"
        )
    return names


@cache
def missing_reader(image_format: str) -> str | None:
    """Return how to install the reader of a format of `FILE_FORMATS`, or None if it is there."""
    if image_format not in _OPTIONAL_READERS:
        return None
    from importlib.util import find_spec  # few images are in these formats

    module, remedy = _OPTIONAL_READERS[image_format]
    return None if find_spec(module) else remedy


@cache
def reader(image_format: str) -> type[ImageFile]:
    """Return Pillow's reader of one of `FILE_FORMATS`, without importing those of other formats."""
    module, name = _READERS[image_format]
    loaded: type[ImageFile] = getattr(import_module(module), name)
    return loaded
