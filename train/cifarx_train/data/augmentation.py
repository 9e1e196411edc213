"""Augmentation of whole batches of images on the training device.

All random numbers come from PyTorch's default generator of that device, so they can be saved and restored with its
state, and CUDA graphs advance them.
"""

import torch

from cifarx_serve.spec import InputSpec
from cifarx_train.recipes import Recipe

# The weights of red, green and blue in the luma of ITU-R BT.601, as in Pillow's and torchvision's grayscale conversion.
_LUMA_WEIGHTS = (0.299, 0.587, 0.114)


class Augmentation:
    """The augmentation of a recipe. Takes and returns images, uint8 (N, H, W, channels).

    Args:
        recipe: provides `flip`, `crop`, `cutout` and `jitter`.
        spec: its mean is the fill color of cutout, so that the network's input is zero there.
        device: the device of the images.
    """

    def __init__(self, recipe: Recipe, spec: InputSpec, device: torch.device) -> None:
        self._recipe = recipe
        low, high = spec.value_range
        mean = spec.mean[::-1] if spec.color == "BGR" else spec.mean  # images are always RGB
        fill = (torch.tensor(mean) - low) / (high - low) * 255
        self._fill = fill.round().clamp(0, 255).to(device, torch.uint8)
        self._luma_weights = torch.tensor(_LUMA_WEIGHTS if spec.channels == 3 else (1.0,), device=device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self._recipe.flip or self._recipe.crop:
            images = random_crop_flip(images, self._recipe.crop, self._recipe.flip)
        if self._recipe.jitter:
            images = color_jitter(images, self._recipe.jitter, self._luma_weights)
        if self._recipe.cutout:
            images = cutout(images, self._recipe.cutout, self._fill)
        return images


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
