"""Decodes images from files, bytes, Pillow images and arrays to upright 8-bit RGB."""

import io
import os
import threading
import warnings
from pathlib import Path
from typing import IO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cifarx_serve.errors import ImageError, error_message

MAX_PIXELS: Final = 100_000_000
"""Larger images are refused before they are decoded. As RGB, an image of this size takes 300 MB."""

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"

# The EXIF tag of the camera orientation, and the operation that corrects each of its values (Exif 2.3, section 4.6.4).
_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Keys of `Image.info` that can contain an orientation. Most images have none, which saves 3 ms in the TIFF reader.
_EXIF_IN_INFO: Final = frozenset({"JPEG", "PNG", "WEBP", "GIF", "BMP"})
_EXIF_KEYS: Final = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})

# Formats whose 16-bit grayscale images Pillow opens in the 32-bit mode I (PNG until Pillow 10.3).
_16_BIT_AS_MODE_I: Final = ("PPM", "PNG")


class TooManyPixels(ImageError):
    """Raised for an image with more pixels than the limit."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image file and read only its header. Pass the result to `read_image` to decode it.

    Args:
        data: the content of the file.
        max_pixels: the largest number of pixels to accept.

    Raises:
        ImageError: the file is not an image.
        TooManyPixels: the image has more pixels than `max_pixels`.
    """
    return _open(io.BytesIO(data), f"{len(data)} bytes", max_pixels, _format(data))


def read_image(source: ImageSource) -> Image.Image:
    """Decode one image to upright RGB.

    The EXIF orientation of the camera is applied, transparent pixels are blended with white, 16-bit grayscale is scaled
    to 8 bits, and only the first frame of an animation is used.

    Args:
        source: a path, the content of an image file, a Pillow image, or a uint8 array of shape (H, W), (H, W, 3) or
            (H, W, 4).

    Raises:
        ImageError: the file does not exist or cannot be read, is not an image, or is truncated; the image is too large
            or empty; or the array has a wrong shape or dtype.
    """
    if isinstance(source, Image.Image):
        with _ImageErrors("the image"):  # the pixels of an opened image are read only now
            return to_rgb(source)
    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source))
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"{len(source)} bytes", _format(source))
    path = Path(source)
    try:
        with path.open("rb") as file:
            return _decode(file, str(path))
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a folder", "give an image file") from error
    except ValueError as error:
        raise ImageError(f"cannot open image {str(path)!r} ({error})", "check the path") from error
    except OSError as error:
        remedy = "check the path" if isinstance(error, FileNotFoundError) else "make it readable"
        raise ImageError(f"cannot open image {path} ({error_message(error)})", remedy) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to upright 8-bit RGB."""
    if 0 in image.size:
        raise ImageError(f"the image is empty ({image.width}x{image.height} pixels)", "give an image that has pixels")
    image = _upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _16_BIT_AS_MODE_I):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # some decoders of Pillow apply the orientation themselves and then remove it
    if image.format in _EXIF_IN_INFO and not _EXIF_KEYS & image.info.keys():
        return image
    operation = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    if operation is None:
        return image
    # `ImageOps.exif_transpose` would also rewrite the EXIF data, which fails if they are damaged.
    upright = image.transpose(operation)
    upright.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return upright


def _decode(file: IO[bytes], name: str, formats: tuple[str] | None = None) -> Image.Image:
    with _ImageErrors(name):
        return to_rgb(_open(file, name, MAX_PIXELS, formats))


def _open(file: IO[bytes], name: str, max_pixels: int, formats: tuple[str] | None) -> Image.Image:
    with _ImageErrors(name):
        image = Image.open(file, formats=formats)
        if image.format == "EPS":  # Pillow would run it with Ghostscript
            raise ImageError(f"{name} is EPS, which is a program", "save it as PNG first")
        if image.width * image.height > max_pixels:
            raise _too_large(f"{image.width}x{image.height} pixels", name, max_pixels)
        return image


def _format(data: bytes) -> tuple[str] | None:
    """Return the format of a PNG or JPEG file, so that Pillow does not try the readers of all other formats first."""
    if data.startswith(b"\x89PNG"):
        return ("PNG",)
    return ("JPEG",) if data.startswith(b"\xff\xd8\xff") else None


class _SuppressPillowWarnings:
    """Context manager that suppresses Pillow's warnings of large images and damaged metadata.

    `MAX_PIXELS` replaces the former, and the pixels are intact in spite of the latter. Warning filters belong to the
    process, so the first thread to enter changes them and the last one to leave restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._catcher = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._entered:
                self._catcher = warnings.catch_warnings()
                self._catcher.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                self._catcher.__exit__(None, None, None)


suppress_pillow_warnings: Final = _SuppressPillowWarnings()
"""Active while an image is decoded. A server keeps it active all the time, which saves 20 µs per image."""


class _ImageErrors:
    """Context manager that converts exceptions of Pillow to `ImageError`; a generator would be half as fast."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        suppress_pillow_warnings.__enter__()

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        suppress_pillow_warnings.__exit__()
        if isinstance(error, Exception) and not isinstance(error, ImageError):
            raise _image_error(error, self._name) from error


def _image_error(error: Exception, name: str) -> ImageError:
    if isinstance(error, Image.DecompressionBombError):
        return _too_large("a decompression bomb", name, MAX_PIXELS)
    if isinstance(error, UnidentifiedImageError):
        return ImageError(f"{name} is not an image", "give a JPEG, PNG, WebP, BMP, TIFF or GIF file")
    return ImageError(f"{name} is truncated or damaged ({error_message(error)})", "save or copy the image again")


def _too_large(what: str, name: str, limit: int) -> TooManyPixels:
    return TooManyPixels(f"{name} is {what}, over the limit of {limit:,} pixels", "resize the image first")


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"cannot take an array of shape {array.shape} and dtype {array.dtype} as an image",
            "give uint8 of shape (H, W), (H, W, 3) or (H, W, 4)",
        )
    return Image.fromarray(np.ascontiguousarray(array))
