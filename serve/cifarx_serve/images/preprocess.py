"""Converts images to the input of a network. Training, export and serving all use these functions.

The pixels of an image are uint8 (height, width, channels): RGB, or grayscale for a network with one channel. `resize`
makes pixels of the network's size, and `normalize` makes the network's input from them. Sizes and positions are those
of the libraries that people train with:

- `shorter_side` equals torchvision's `Resize(resize_to)` and `CenterCrop((height, width))` on a Pillow image: the
  longer side is `int(resize_to * longer / shorter)`.
- `stretch` equals torchvision's `Resize((height, width))`. With `resize_to`, it equals `Resize(resize_to)` and
  `CenterCrop((height, width))`, the crop mode "squash" of timm.
- `letterbox` scales by `r = min(height / H, width / W)` to `round(r * H)` by `round(r * W)` pixels, as `LetterBox` of
  Ultralytics does, and pads the rest with `fill`.

A crop starts at `round((size - crop) / 2)`, where halves are rounded to even as in `CenterCrop`, or rounded down for
the `crop_offset` "floor". A padding of `n` pixels has `n // 2` of them above or on the left. That is `CenterCrop`, and
also `round(n / 2 - 0.1)` of `LetterBox`.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.images.pixel_limits import require_pixels
from cifarx_serve.images.reader import MAX_PIXELS
from cifarx_serve.spec import InputSpec, ModelSpec

_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


_FILTER_RADIUS: Final = 3
"""The radius of the widest filter, Lanczos, in pixels of the larger of the two images."""

MAX_RESIZED_PIXELS: Final = 1 << 24
"""A panorama that would have more pixels, and 16 times those of the input, is resized within the crop only.

An image of 1x5,000 pixels whose shorter side is resized to 256 would have 328 million.
"""


def resize(image: Image.Image, spec: InputSpec) -> NDArray[np.uint8]:
    """Resize an RGB image to the input size of the network, and crop or pad it as the spec says.

    With `antialias`, the pixels equal those of torchvision on a Pillow image bit for bit, or up to one level for the
    panoramas of `MAX_RESIZED_PIXELS`. Without it, they equal those of torchvision's `resize(..., antialias=False)` on a
    float tensor, rounded: exactly for nearest, and up to one level in about one of a thousand values for bilinear and
    bicubic, because sums are ordered differently. On some CPUs, torchvision's v2 resizes uint8 tensors in fixed point,
    which differs more: by one level in a tenth of the values for bilinear, and by its own bicubic filter.

    Returns:
        uint8 of shape (height, width, channels): RGB, or grayscale as of Pillow's mode L.
    """
    if spec.color == "L":
        image = image.convert("L")
    before = image.size
    size = resized_size(*before, spec)
    if before == size:
        pixels = np.asarray(image)
    elif not spec.antialias:
        from cifarx_serve.images.interpolate import interpolate

        pixels = interpolate(np.asarray(image), size, _kept(size, spec), spec.interpolation)
    elif spec.resize == "shorter_side" and math.prod(size) > max(MAX_RESIZED_PIXELS, 16 * spec.height * spec.width):
        pixels = _resize_crop(image, size, spec)
    else:
        pixels = np.asarray(image.resize(size, _FILTERS[spec.interpolation]))
    if spec.color == "L":
        pixels = pixels[..., None]
    return pixels if size == (spec.width, spec.height) else _crop_or_pad(pixels, spec)


def _resize_crop(image: Image.Image, size: tuple[int, int], spec: InputSpec) -> NDArray[np.uint8]:
    """Resize only the part of an image that the crop keeps, with the pixels around it that the filter needs."""
    rows, columns = _kept(size, spec)
    left, right, x = _source_span(columns, image.width, size[0])
    top, bottom, y = _source_span(rows, image.height, size[1])
    box = (x.start, y.start, x.stop, y.stop)
    target = (columns.stop - columns.start, rows.stop - rows.start)
    part = image.crop((left, top, right, bottom))
    return np.asarray(part.resize(target, _FILTERS[spec.interpolation], box=box))


def _source_span(kept: slice, before: int, after: int) -> tuple[int, int, slice]:
    """Return which pixels of an axis the filter needs, and what becomes `kept`, relative to the first of them.

    Args:
        kept: the pixels to make.
        before, after: the length of the axis before and after it is resized.
    """
    scale = before / after
    radius = _FILTER_RADIUS * max(1.0, scale) + 1
    first = max(0, math.floor(kept.start * scale - radius))
    last = min(before, math.ceil(kept.stop * scale + radius))
    # Relative, because Pillow stores these numbers in single precision.
    return first, last, slice(kept.start * scale - first, min(kept.stop * scale, last) - first)


def resized_size(width: int, height: int, spec: InputSpec) -> tuple[int, int]:
    """Return the width and height to which an image is resized, before it is cropped or padded."""
    if spec.resize == "stretch":
        if spec.resize_to is None:
            return spec.width, spec.height
        assert isinstance(spec.resize_to, tuple), "the spec allows no number here"
        return spec.resize_to[1], spec.resize_to[0]
    if spec.resize == "letterbox":
        scale = min(spec.height / height, spec.width / width)
        return max(1, round(scale * width)), max(1, round(scale * height))
    shorter = spec.resize_to or spec.height
    assert isinstance(shorter, int), "the spec allows no size here"
    longer = int(shorter * max(width, height) / min(width, height))
    return (shorter, longer) if width <= height else (longer, shorter)


def peak_pixels(width: int, height: int, spec: InputSpec) -> int:
    """Return the number of pixels that an image has before or after its shorter side is resized, whichever is more.

    A model with embedded preprocessing needs memory for them. Other ways to resize always have the same size.
    """
    if spec.resize != "shorter_side":
        return width * height
    return max(width * height, math.prod(resized_size(width, height, spec)))


def is_unchanged(shape: tuple[int, ...], spec: InputSpec) -> bool:
    """Return whether pixels of this shape, (height, width, channels), are already those that `resize` would return."""
    size = (spec.width, spec.height)
    return shape == (spec.height, spec.width, spec.channels) and resized_size(*size, spec) == size


def _kept(size: tuple[int, int], spec: InputSpec) -> tuple[slice, slice]:
    """Return the rows and the columns of an image of this width and height that the center crop keeps."""
    return _centered(size[1], spec.height, spec)[0], _centered(size[0], spec.width, spec)[0]


def _crop_or_pad(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """Crop and pad pixels to (height, width) around their center."""
    rows, target_rows = _centered(pixels.shape[0], spec.height, spec)
    columns, target_columns = _centered(pixels.shape[1], spec.width, spec)
    result = np.empty((spec.height, spec.width, spec.channels), np.uint8)
    result[:] = rgb_fill(spec)
    result[target_rows, target_columns] = pixels[rows, columns]
    return result


def _centered(size: int, target: int, spec: InputSpec) -> tuple[slice, slice]:
    """Return the part of an axis of length `size` that is kept, and where in the axis of length `target` it goes."""
    if size >= target:
        start = crop_start(size, target, spec)
        return slice(start, start + target), slice(0, target)
    start = (target - size) // 2
    return slice(0, size), slice(start, start + size)


def crop_start(size: int, target: int, spec: InputSpec) -> int:
    """Return the first of the `target` pixels that the center crop keeps of an axis of length `size`."""
    cut_off = size - target
    return cut_off // 2 if spec.crop_offset == "floor" else round(cut_off / 2)


def rgb_fill(spec: InputSpec) -> NDArray[np.uint8]:
    """Return the value of padded pixels, uint8 (channels,), in the order of the pixels, which are never BGR."""
    fill = np.broadcast_to(np.array(spec.fill, np.uint8), spec.channels)
    return fill[::-1] if spec.color == "BGR" else fill


def undo_crop(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """Return images that `resize` converts to these pixels without any interpolation: it only crops them again.

    They are for files with embedded preprocessing, which always resize and crop. The pixels themselves are returned if
    the spec crops nothing. If the crop is larger than the resized image in both directions, the rows at the top and the
    bottom are lost, because the crop pads them.

    Args:
        pixels: uint8 of shape (N, height, width, channels), at the input size of the network.
        spec: how the images are resized.

    Returns:
        uint8 of shape (N, H, W, channels).
    """
    if spec.resize == "letterbox" or spec.resize_to is None:
        return pixels
    if isinstance(spec.resize_to, tuple):
        height, width = spec.resize_to
    elif min(spec.height, spec.width) <= spec.resize_to:
        height, width = max(spec.height, spec.resize_to), max(spec.width, spec.resize_to)
    else:
        height, width = spec.resize_to, spec.width
    target_rows, rows = _centered(height, spec.height, spec)
    target_columns, columns = _centered(width, spec.width, spec)
    images = np.empty((len(pixels), height, width, spec.channels), np.uint8)
    images[:] = rgb_fill(spec)
    images[:, target_rows, target_columns] = pixels[:, rows, columns]
    return images


def normalize(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """Scale pixels to the value range of the spec, normalize them, and order channels and axes as the network does.

    With a range of 0 to 1, mean 0 and standard deviation 1, the result equals that of torchvision's `ToTensor` bit for
    bit.

    Args:
        pixels: uint8 of shape (N, H, W, channels), RGB or grayscale.
        spec: the color, layout, value range, mean and standard deviation.

    Returns:
        float32 of shape (N, channels, H, W), or (N, H, W, channels) for the layout NHWC.
    """
    if spec.color == "BGR":
        pixels = pixels[..., ::-1]
    channels_first = spec.layout == "NCHW"
    batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) if channels_first else pixels).astype(np.float32)
    batch /= np.float32(255)
    low, high = spec.value_range
    if (low, high) != (0.0, 1.0):
        batch *= np.float32(high - low)
        batch += np.float32(low)
    if any(spec.mean) or any(std != 1.0 for std in spec.std):
        shape = (1, -1, 1, 1) if channels_first else (-1,)
        batch -= np.asarray(spec.mean, np.float32).reshape(shape)
        batch /= np.asarray(spec.std, np.float32).reshape(shape)
    return batch


def model_pixels(image: Image.Image, spec: ModelSpec, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the pixels that `pixels_to_input` takes for an RGB image.

    Args:
        image: the image.
        spec: the model's spec.
        max_pixels: the largest number of pixels to which a model with embedded preprocessing may resize the image.

    Returns:
        uint8 of shape (height, width, channels): those of the whole image for a model with embedded preprocessing, or
        else those that `resize` returns.

    Raises:
        TooManyPixels: the model would resize the image, before it crops it, to more than `max_pixels` pixels.
    """
    if not spec.embedded_preprocessing:
        return resize(image, spec.input)
    require_pixels(*resized_size(*image.size, spec.input), "the image", max_pixels, "is resized to")
    return np.asarray(image.convert("L"))[..., None] if spec.input.color == "L" else np.asarray(image)


def pixels_to_input(pixels: NDArray[np.uint8], spec: ModelSpec) -> NDArray[Any]:
    """Return the batch that a model's backend takes for pixels of `model_pixels`, uint8 (N, H, W, channels)."""
    return pixels if spec.embedded_preprocessing else normalize(pixels, spec.input)


def model_input(pixels: NDArray[np.uint8], spec: ModelSpec) -> NDArray[Any]:
    """Return the batch that a model's backend takes for pixels at the input size of the network.

    Args:
        pixels: uint8 of shape (N, height, width, channels), RGB or grayscale.
        spec: the model's spec.

    Returns:
        float32 of the shape (N, *spec.input.shape); or, for a model with embedded preprocessing, images that it
        converts to exactly these pixels: uint8 (N, H, W, channels).
    """
    return undo_crop(pixels, spec.input) if spec.embedded_preprocessing else normalize(pixels, spec.input)
