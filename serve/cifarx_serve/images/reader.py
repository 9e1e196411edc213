"""Decodes images from files, bytes, Pillow images and arrays to upright 8-bit RGB."""

import io
import os
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cifarx_serve.errors import CifarxError, ImageError, error_message
from cifarx_serve.files.regular_file import open_file_or_pipe
from cifarx_serve.images.image_format import (
    FILE_FORMATS,
    FORMATS,
    HEAD_BYTES,
    NOT_AN_IMAGE,
    extra_formats,
    reader,
    require_accepted,
)
from cifarx_serve.images.inner_sizes import require_few_scans, require_small_structure
from cifarx_serve.images.levels import has_more_than_8_bits, to_8_bits
from cifarx_serve.images.pixel_limits import TooManyPixels, require_pixels

MAX_PIXELS: Final = 100_000_000
"""Larger images are refused before they are decoded. As RGB, an image of this size takes 300 MB."""

MAX_BYTES: Final = 1 << 30
"""Larger files are refused. An image of `MAX_PIXELS` takes 300 MB in the largest of the common formats."""


class BinaryFile(Protocol):
    """An open file, or anything else that is read like one, such as an HTTP response or a member of an archive."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes; none at the end."""


ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | Image.Image | NDArray[np.uint8]"
)

_CHUNK: Final = 1 << 20

# The EXIF tag of the camera's orientation, and the operation that corrects each of its values.
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

# Formats whose metadata are in `Image.info`, and the keys that can contain an orientation. Most images have none.
_METADATA_IN_INFO: Final = frozenset({"JPEG", "PNG", "WEBP", "GIF", "BMP"})
_METADATA_KEYS: Final = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})

# Formats that are read into memory first: their structure is checked in all of the file, which is compressed.
_READ_AT_ONCE: Final = frozenset({"JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIC"})


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image file and read only its header. Pass the result to `read_image` to decode it.

    Args:
        data: the content of the file, in one of the formats `image_format.FORMATS`.
        max_pixels: the largest number of pixels to accept.

    Raises:
        ImageError: the file is not an image, its format is not accepted, or it has too many parts.
        TooManyPixels: the image has more pixels than `max_pixels`, or contains parts that have.
    """
    return _open(io.BytesIO(data), f"{len(data)} bytes", max_pixels, FORMATS)


def read_image(source: ImageSource) -> Image.Image:
    """Decode one image to upright RGB.

    The EXIF orientation of the camera is applied, transparent pixels are blended with white, grayscale of more than 8
    bits is scaled (see `levels.to_8_bits`), and only the first frame of an animation is used.

    Args:
        source: a path, the content of an image file, a binary file object, a Pillow image, or a uint8 array of shape
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). A file object is read from its start if it can seek, as Pillow
            does, or else from where it is, and not closed.

    Raises:
        ImageError: the file does not exist or cannot be read, is not an image, or is truncated; its format is not
            accepted; the image or a part of it is too large or empty; the array has a wrong shape or dtype; or the
            source is something else, such as None or a URL.
        UsageError: as for `image_format.extra_formats`.
    """
    if isinstance(source, Image.Image):
        with _ImageErrors("the image"):  # the pixels of an opened image are read only now
            return to_rgb(source)
    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source))
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) > MAX_BYTES:
            raise _too_many_bytes("the content")
        return _decode(io.BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, str | os.PathLike):
        return _read_path(source)
    if hasattr(source, "read"):
        content = _read_file_object(source)
        return _decode(io.BytesIO(content), f"a file object of {len(content)} bytes")
    raise _not_a_source(source)


def _read_path(source: "str | os.PathLike[str]") -> Image.Image:
    path = Path(os.fsdecode(source))
    try:
        with open_file_or_pipe(path) as file:
            return _decode(file, str(path))
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a folder", "give an image file") from error
    except ValueError as error:
        raise ImageError(f"cannot open image {str(path)!r} ({error})", "check the path") from error
    except OSError as error:
        from cifarx_serve.images.urls import is_url, url_error  # few paths cannot be opened

        if is_url(name := os.fsdecode(source)):
            raise url_error(name) from error
        remedy = "check the path" if isinstance(error, FileNotFoundError) else "make it readable"
        raise ImageError(f"cannot open image {path} ({error_message(error)})", remedy) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to upright 8-bit RGB.

    Raises:
        ImageError: the image is empty, or its numbers have an unknown range.
    """
    if 0 in image.size:
        raise ImageError(f"the image is empty ({image.width}x{image.height} pixels)", "give an image that has pixels")
    stored, image = image, _upright(image)
    if has_more_than_8_bits(image):
        return to_8_bits(image, stored).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # some decoders of Pillow apply the orientation themselves and then remove it
    if image.format in _METADATA_IN_INFO:
        if not _METADATA_KEYS & image.info.keys():
            return image
        from cifarx_serve.images.orientation import stored_orientation  # few images need it

        orientation = stored_orientation(image.info)
    else:
        orientation = image.getexif().get(_ORIENTATION)
    operation = None if orientation is None else _UPRIGHT.get(orientation)
    if operation is None:
        return image
    # `ImageOps.exif_transpose` would also rewrite the EXIF data, which fails if they are damaged.
    upright = image.transpose(operation)
    upright.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return upright


def _decode(file: IO[bytes], name: str) -> Image.Image:
    with _ImageErrors(name):
        return to_rgb(_open(file, name, MAX_PIXELS, FILE_FORMATS))


def _open(file: IO[bytes], name: str, max_pixels: int, accepted: tuple[str, ...]) -> Image.Image:
    with _ImageErrors(name):
        head = file.read(HEAD_BYTES)
        image_format = require_accepted(head, name, accepted)
        if not isinstance(file, io.BytesIO) and (image_format in _READ_AT_ONCE or not file.seekable()):
            file = _read(file, head, name)
        file.seek(0)
        if image_format not in accepted:
            image: Image.Image = Image.open(file, formats=extra_formats())
            require_pixels(*image.size, name, max_pixels)
            return image
        require_small_structure(image_format, file, name, max_pixels)
        file.seek(0)
        image = reader(image_format)(file)
        require_pixels(*image.size, name, max_pixels)
        if isinstance(file, io.BytesIO) and image_format == "JPEG":
            require_few_scans(image, file, name)
        return image


def _read(file: IO[bytes], head: bytes, name: str) -> io.BytesIO:
    content = head + file.read(MAX_BYTES - len(head) + 1)
    if len(content) > MAX_BYTES:
        raise _too_many_bytes(name)
    return io.BytesIO(content)


def _read_file_object(file: BinaryFile) -> bytes:
    """Return the content of a file object. One that cannot seek may return less than it is asked for."""
    content = bytearray()
    try:
        with suppress(AttributeError, OSError, ValueError):  # it cannot seek; if it is closed, reading says so
            file.seek(0)  # type: ignore[attr-defined]
        while chunk := file.read(_CHUNK):
            content += chunk
            if len(content) > MAX_BYTES:
                raise _too_many_bytes("the file object")
    except CifarxError:
        raise
    except Exception as error:  # the exceptions of file objects, such as those of an HTTP library, are not known
        text = isinstance(error, TypeError | UnicodeError)
        remedy = "open it in binary mode, as open(path, 'rb')" if text else "open it again"
        raise ImageError(f"cannot read the file object ({error_message(error)})", remedy) from error
    return bytes(content)


def _not_a_source(source: Any) -> ImageError:
    """Return the error for an object that is no image: None is what `cv2.imread` returns for an unreadable file."""
    what = "None" if source is None else f"a {type(source).__module__}.{type(source).__qualname__}"
    remedy = "give a path, the content of a file, a file object, a Pillow image, or a uint8 array"
    if hasattr(source, "__array__"):
        remedy = "give a uint8 array of shape (H, W, 3), such as tensor.permute(1, 2, 0).numpy() of (3, H, W)"
    return ImageError(f"{what.removeprefix('a builtins.')} is not an image", remedy)


def _too_many_bytes(name: str) -> ImageError:
    return ImageError(f"{name} has more than {MAX_BYTES:,} bytes", "resize the image first")


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
        if isinstance(error, Exception) and not isinstance(error, CifarxError):
            raise _image_error(error, self._name) from error


def _image_error(error: Exception, name: str) -> ImageError:
    if isinstance(error, Image.DecompressionBombError):
        return TooManyPixels(f"{name} is a decompression bomb ({error_message(error)})", "resize the image first")
    if isinstance(error, MemoryError):
        return ImageError(f"{name} needs more memory than there is", "resize the image first")
    if isinstance(error, SyntaxError) and "pixel mode" in str(error):
        return ImageError(f"{name} has pixels of a kind that Pillow does not read", "save it with 8 bits per channel")
    if isinstance(error, UnidentifiedImageError | SyntaxError):  # a SyntaxError is how a reader rejects a file
        return ImageError(f"{name} is not an image", NOT_AN_IMAGE)
    return ImageError(f"{name} is truncated or damaged ({error_message(error)})", "save or copy the image again")


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ImageError(
            f"cannot take an array of shape {array.shape} and dtype {array.dtype} as an image",
            "give uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)",
        )
    if array.shape[2:] == (1,):
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))
