"""From anything that holds an image to an RGB picture."""

import io
import os
import threading
import warnings
from pathlib import Path
from typing import IO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cifarx_serve.errors import ImageError

MAX_PIXELS: Final = 100_000_000
"""A larger picture is refused before it is decoded: 300 MB of RGB is more than any classifier asks for."""

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"

# The EXIF tag for the orientation of the camera, and what turns each of its values upright (Exif 2.3, section 4.6.4).
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

# Where Pillow keeps what may hold an orientation. Looking there first spares most pictures its TIFF reader (3 ms).
_EXIF_IN_INFO: Final = frozenset({"JPEG", "PNG", "WEBP", "GIF", "BMP"})
_EXIF_KEYS: Final = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})

# Pillow's mode I has 32 bits; from these formats it holds 16-bit grey (PNG until Pillow 10.3).
_SIXTEEN_BITS_AS_I: Final = ("PPM", "PNG")


class TooManyPixels(ImageError):
    """A picture over the limit."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The header alone of an image file; `read_image` of what it gives decodes it.

    Args:
        data: the file's bytes.
        max_pixels: a larger picture is refused.

    Raises:
        ImageError: not an image. TooManyPixels: over the limit.
    """
    return _open(io.BytesIO(data), f"{len(data)} bytes", max_pixels, _format(data))


def read_image(source: ImageSource) -> Image.Image:
    """Decode one image to RGB, upright.

    The camera's EXIF orientation is applied. Transparency is composited over white. 16-bit grey is scaled to
    8 bits. Of an animation the first frame is taken.

    Args:
        source: a path, the bytes of an image file, a Pillow image, or a uint8 array of shape (H, W), (H, W, 3)
            or (H, W, 4).

    Raises:
        ImageError: no such file, not an image, truncated, too large, without a pixel, or an array of another
            shape or dtype.
    """
    if isinstance(source, Image.Image):
        with _ImageErrors("the image"):  # Pillow reads the file of an opened image when its pixels are asked for
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
        raise ImageError(f"{path} is a folder", "name an image file") from error
    except ValueError as error:
        raise ImageError(f"cannot open image {str(path)!r} ({error})", "check the path") from error
    except OSError as error:
        remedy = "check the path" if isinstance(error, FileNotFoundError) else "make it readable"
        raise ImageError(f"cannot open image {path} ({error.strerror or error})", remedy) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as upright 8-bit RGB."""
    if 0 in image.size:
        raise ImageError(f"an image of {image.width}x{image.height} pixels", "give one that has pixels")
    image = _upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS_AS_I):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # some of Pillow's decoders turn the picture themselves, and then say so
    if image.format in _EXIF_IN_INFO and not _EXIF_KEYS & image.info.keys():
        return image
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    if turn is None:
        return image
    # Not with `ImageOps.exif_transpose`: it writes the EXIF block anew, which fails on damaged ones.
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return turned


def _decode(file: IO[bytes], name: str, formats: tuple[str] | None = None) -> Image.Image:
    with _ImageErrors(name):
        return to_rgb(_open(file, name, MAX_PIXELS, formats))


def _open(file: IO[bytes], name: str, max_pixels: int, formats: tuple[str] | None) -> Image.Image:
    with _ImageErrors(name):
        image = Image.open(file, formats=formats)
        if image.format == "EPS":  # PostScript is a program, and Pillow would have Ghostscript run it
            raise ImageError(f"{name} is EPS, a program rather than a picture", "save it as PNG first")
        if image.width * image.height > max_pixels:
            raise _too_large(f"{image.width}x{image.height} pixels", name, max_pixels)
        return image


def _format(data: bytes) -> tuple[str] | None:
    """The format of the commonest files, told by their start: Pillow would ask the reader of every other first."""
    if data.startswith(b"\x89PNG"):
        return ("PNG",)
    return ("JPEG",) if data.startswith(b"\xff\xd8\xff") else None


class _WithoutPillowsWarnings:
    """Of large pictures, where the limit is ours, and of damaged metadata, where the pixels are sound.

    The filters are the whole process's: the first of several threads inside changes them, the last puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.__exit__(None, None, None)


without_pillows_warnings: Final = _WithoutPillowsWarnings()
"""Around the decoding of an image; a program that decodes all day is inside it all day, and saves 20 us an image."""


class _ImageErrors:
    """Whatever Pillow raises inside, as ImageError; a class, because a generator would take twice as long to enter."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        without_pillows_warnings.__enter__()

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        without_pillows_warnings.__exit__()
        if isinstance(error, Exception) and not isinstance(error, ImageError):
            raise _image_error(error, self._name) from error


def _image_error(error: Exception, name: str) -> ImageError:
    if isinstance(error, Image.DecompressionBombError):
        return _too_large("a decompression bomb", name, MAX_PIXELS)
    if isinstance(error, UnidentifiedImageError):
        return ImageError(f"{name} is not an image", "give a JPEG, PNG, WebP, BMP, TIFF or GIF file")
    reason = " ".join(str(error).split()) or type(error).__name__  # what the decoders raise has no common base
    return ImageError(f"{name} is truncated or damaged ({reason})", "save or copy the image again")


def _too_large(what: str, name: str, limit: int) -> TooManyPixels:
    return TooManyPixels(f"{name} is {what}, over the limit of {limit:,} pixels", "resize the image first")


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"cannot take an array of shape {array.shape} and dtype {array.dtype} as an image",
            "give uint8 of shape (H, W), (H, W, 3) or (H, W, 4)",
        )
    return Image.fromarray(np.ascontiguousarray(array))
