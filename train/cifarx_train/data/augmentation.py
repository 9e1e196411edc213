"""Augmentation of whole batches of images on the training device.

All random numbers come from PyTorch's default generator of that device, so they can be saved and restored with its
state, and CUDA graphs advance them.
"""

import math
from typing import Final

import torch

from cifarx_serve.spec import InputSpec
from cifarx_train.data.auto_augment import AutoAugment
from cifarx_train.data.mixing import Mixing, Targets
from cifarx_train.recipes import Recipe

LUMA_WEIGHTS: Final = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in the luma of ITU-R BT.601, as in Pillow's and torchvision's grayscale."""

# The usual ranges of random resized crops (Szegedy et al. 2015) and of random erasing (Zhong et al. 2020), which are
# also the defaults of torchvision's transforms.
_CROP_RATIOS: Final = (3 / 4, 4 / 3)
_ERASED_AREAS: Final = (0.02, 0.33)
_ERASED_RATIOS: Final = (0.3, 3.3)


class Augmentation:
    """The augmentation of a recipe. Takes and returns images, uint8 (N, H, W, channels).

    Args:
        recipe: provides the fields from `flip` to `cutmix`.
        spec: its mean is the fill color of blanked pixels, so that the network's input is zero there.
        device: the device of the images.
    """

    def __init__(self, recipe: Recipe, spec: InputSpec, device: torch.device) -> None:
        self._recipe = recipe
        low, high = spec.value_range
        mean = spec.mean[::-1] if spec.color == "BGR" else spec.mean  # images are always RGB
        fill = (torch.tensor(mean) - low) / (high - low) * 255
        self._fill = fill.round().clamp(0, 255).to(device, torch.uint8)
        self._luma_weights = torch.tensor(LUMA_WEIGHTS if spec.channels == 3 else (1.0,), device=device)
        size, name = (spec.height, spec.width), recipe.auto_augment
        self._auto_augment = AutoAugment(name, size, self._fill, self._luma_weights) if name else None
        self._mix = Mixing(recipe, device) if recipe.mixup or recipe.cutmix else None

    def mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, Targets]:
        """Return the images and their labels after mixup and CutMix, which come last."""
        return self._mix(images, labels) if self._mix else (images, labels)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self._recipe.random_resized_crop:
            images = random_resized_crop(images, self._recipe.random_resized_crop)
        if self._recipe.flip or self._recipe.crop:
            images = random_crop_flip(images, self._recipe.crop, self._recipe.flip)
        if self._auto_augment:
            images = self._auto_augment(images)
        if self._recipe.jitter:
            images = color_jitter(images, self._recipe.jitter, self._luma_weights)
        if self._recipe.cutout:
            images = cutout(images, self._recipe.cutout, self._fill)
        if self._recipe.random_erasing:
            images = random_erasing(images, self._recipe.random_erasing, self._fill)
        return images


def random_resized_crop(images: torch.Tensor, smallest: float) -> torch.Tensor:
    """Crop each image to a random rectangle and resize it to its size again, bilinearly.

    Its area is `smallest` to 1 times that of the image, and its aspect ratio 3/4 to 4/3 times. A side that would be
    longer than that of the image is shortened, where torchvision's `RandomResizedCrop` draws again.

    Args:
        images: uint8 (N, H, W, channels).
        smallest: the smallest area as a fraction of the image's.
    """
    count, height, width, _ = images.shape
    heights, widths = _random_rectangles(count, (height, width), (smallest, 1.0), _CROP_RATIOS, images.device)
    top = (torch.rand(count, 1, device=images.device) * (height - heights + 1)).floor_()
    left = (torch.rand(count, 1, device=images.device) * (width - widths + 1)).floor_()
    index = torch.arange(count, device=images.device)[:, None]
    levels = images.to(torch.float32)
    low, high, share = _source_positions(height, top, heights)
    levels = torch.lerp(levels[index, low], levels[index, high], share[:, :, None, None])
    low, high, share = _source_positions(width, left, widths)
    columns = levels.transpose(1, 2)
    levels = torch.lerp(columns[index, low], columns[index, high], share[:, :, None, None]).transpose(1, 2)
    return levels.round_().to(torch.uint8).contiguous()


def _source_positions(
    size: int, start: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the two pixels between which each of `size` output pixels lies, int64 (N, size), and where between them.

    Args:
        size: the length of the axis.
        start, length: the first pixel and the number of pixels of the crop, float32 (N, 1).
    """
    middles = torch.arange(size, device=start.device) + 0.5
    positions = (middles * (length / size) - 0.5).clamp_(min=0.0)
    low = positions.floor()
    high = torch.minimum(low + 1, length - 1)
    return (start + low).long(), (start + high).long(), positions - low


def _random_rectangles(
    count: int,
    size: tuple[int, int],
    areas: tuple[float, float],
    ratios: tuple[float, float],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the heights and widths of random rectangles in images, in whole pixels, float32 (N, 1) each.

    Args:
        count: N.
        size: the height and width of the images.
        areas: the smallest and largest area, as a fraction of the image's.
        ratios: the smallest and largest aspect ratio. Its logarithm is uniformly distributed.
        device: the device.
    """
    height, width = size
    area = torch.empty(count, 1, device=device).uniform_(*areas) * (height * width)
    ratio = torch.empty(count, 1, device=device).uniform_(math.log(ratios[0]), math.log(ratios[1])).exp_()
    heights, widths = (area / ratio).sqrt_(), (area * ratio).sqrt_()
    return heights.round_().clamp_(1, height), widths.round_().clamp_(1, width)


def random_erasing(images: torch.Tensor, probability: float, fill: torch.Tensor) -> torch.Tensor:
    """Fill a random rectangle of some of the images, which lies within the image.

    Args:
        images: uint8 (N, H, W, channels).
        probability: the probability that an image gets a rectangle.
        fill: the fill color, uint8 (channels,).
    """
    count, height, width, _ = images.shape
    heights, widths = _random_rectangles(count, (height, width), _ERASED_AREAS, _ERASED_RATIOS, images.device)
    top = (torch.rand(count, 1, device=images.device) * (height - heights + 1)).floor_()
    left = (torch.rand(count, 1, device=images.device) * (width - widths + 1)).floor_()
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + heights)
    in_columns = (columns >= left) & (columns < left + widths)
    erased = torch.rand(count, 1, device=images.device) < probability
    inside = (in_rows & erased)[:, :, None] & in_columns[:, None, :]
    return torch.where(inside[..., None], fill, images)


def random_crop_flip(images: torch.Tensor, padding: int, flip: bool) -> torch.Tensor:
    """Pad each image by reflection, crop it back to its size at a random position and, if `flip`, mirror half of them.

    The padded images are never built: one gather reads every output pixel from where it is in the original image.

    Args:
        images: uint8 (N, H, W, channels).
        padding: the number of pixels to pad on each side.
        flip: whether to mirror each image with a probability of 0.5.
    """
    count, height, width, _ = images.shape
    rows = _random_shift(height, padding, count, images.device)
    columns = _random_shift(width, padding, count, images.device)
    if flip:
        mirrored = torch.rand(count, 1, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count, device=images.device)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def _random_shift(size: int, padding: int, count: int, device: torch.device) -> torch.Tensor:
    """Return source indices along an axis, int64 (count, size), shifted at random and reflected at both ends."""
    indices = torch.arange(size, device=device)
    if not padding:
        return indices.expand(count, size)
    shifted = (indices + torch.randint(-padding, padding + 1, (count, 1), device=device)).abs()
    return torch.where(shifted >= size, 2 * (size - 1) - shifted, shifted).clamp_(0, size - 1)


def cutout(images: torch.Tensor, side: int, fill: torch.Tensor) -> torch.Tensor:
    """Fill a square around a random pixel of each image.

    The square may extend beyond the border, so every pixel is equally likely to be the center.
    DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with cutout".

    Args:
        images: uint8 (N, H, W, channels).
        side: the side of the square in pixels.
        fill: the fill color, uint8 (channels,).
    """
    count, height, width, _ = images.shape
    inside = (
        _random_span(height, side, count, images.device)[:, :, None]
        & _random_span(width, side, count, images.device)[:, None, :]
    )
    return torch.where(inside[..., None], fill, images)


def _random_span(size: int, side: int, count: int, device: torch.device) -> torch.Tensor:
    """Return a mask along an axis, bool (count, size), that is true in a random span of length `side`."""
    start = torch.randint(0, size, (count, 1), device=device) - side // 2
    indices = torch.arange(size, device=device)
    return (indices >= start) & (indices < start + side)


def color_jitter(images: torch.Tensor, strength: float, luma_weights: torch.Tensor) -> torch.Tensor:
    """Multiply brightness, contrast and saturation of each image by random factors in [1 - strength, 1 + strength].

    As in torchvision's `ColorJitter`, contrast is relative to the mean luma of the image and saturation to the luma of
    each pixel. The order of the three is fixed, and values are clipped once, at the end.

    Args:
        images: uint8 (N, H, W, channels).
        strength: in [0, 1).
        luma_weights: the weights of the channels in the luma, float32 (channels,).
    """
    factors = torch.rand(3, len(images), 1, 1, 1, device=images.device).mul_(2 * strength).add_(1 - strength)
    levels = images.to(torch.float32) * factors[0]
    mean = (levels * luma_weights).sum(3, keepdim=True).mean((1, 2), keepdim=True)
    levels = mean + (levels - mean) * factors[1]
    luma = (levels * luma_weights).sum(3, keepdim=True)
    levels = luma + (levels - luma) * factors[2]
    return levels.round_().clamp_(0, 255).to(torch.uint8)
