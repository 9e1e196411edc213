"""Augmentation of whole batches on the device they are on.

Everything random comes from PyTorch's default generator of that device, so that a saved state continues it and a CUDA
graph advances it.
"""

import torch

from cifarx_serve.spec import InputSpec
from cifarx_train.recipes import Recipe

# Rec. 601's shares of red, green and blue in the brightness, as Pillow's and torchvision's greys have them.
_GREY = (0.299, 0.587, 0.114)


class Augmentation:
    """What a recipe does to training images: uint8 (N, H, W, 3) in, the same out.

    Args:
        recipe: its flip, crop, cutout and jitter.
        spec: its mean is the colour of a cut-out square, so that the network's input is zero there.
        device: where the images will be.
    """

    def __init__(self, recipe: Recipe, spec: InputSpec, device: torch.device) -> None:
        self._recipe = recipe
        low, high = spec.value_range
        blank = (torch.tensor(spec.mean) - low) / (high - low) * 255
        self._blank = blank.round().clamp(0, 255).to(device, torch.uint8)
        self._grey = torch.tensor(_GREY, device=device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self._recipe.flip or self._recipe.crop:
            images = shift(images, self._recipe.crop, self._recipe.flip)
        if self._recipe.jitter:
            images = jitter(images, self._recipe.jitter, self._grey)
        if self._recipe.cutout:
            images = cut_out(images, self._recipe.cutout, self._blank)
        return images


def shift(images: torch.Tensor, reach: int, flip: bool) -> torch.Tensor:
    """Each image moved by up to `reach` pixels along both axes, its edge reflected; half of them mirrored if `flip`.

    A crop of the reflect-padded image, without the padding: the pixel that each pixel comes from is worked out, and
    one gather fetches them all.
    """
    count, height, width, _ = images.shape
    rows = _reflected(height, reach, count, images.device)
    columns = _reflected(width, reach, count, images.device)
    if flip:
        mirrored = torch.rand(count, 1, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    number = torch.arange(count, device=images.device)
    return images[number[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflected(size: int, reach: int, count: int, device: torch.device) -> torch.Tensor:
    """int64 (count, size): places along an axis after a random shift, turned back at both ends."""
    places = torch.arange(size, device=device)
    if not reach:
        return places.expand(count, size)
    moved = (places + torch.randint(-reach, reach + 1, (count, 1), device=device)).abs()
    return torch.where(moved >= size, 2 * (size - 1) - moved, moved).clamp_(0, size - 1)


def cut_out(images: torch.Tensor, side: int, blank: torch.Tensor) -> torch.Tensor:
    """A square of `side` pixels around a random place of each image becomes `blank`, uint8 (3,).

    It may hang over the edge, so that every pixel is as likely to be blanked.
    DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with cutout".
    """
    count, height, width, _ = images.shape
    inside = (
        _span(height, side, count, images.device)[:, :, None] & _span(width, side, count, images.device)[:, None, :]
    )
    return torch.where(inside[..., None], blank, images)


def _span(size: int, side: int, count: int, device: torch.device) -> torch.Tensor:
    """bool (count, size): whether a place along an axis lies within a random span of `side`."""
    start = torch.randint(0, size, (count, 1), device=device) - side // 2
    places = torch.arange(size, device=device)
    return (places >= start) & (places < start + side)


def jitter(images: torch.Tensor, share: float, grey: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of each image times a factor of its own in [1 - share, 1 + share].

    Contrast is around the image's mean brightness, saturation around each pixel's; `grey` float32 (3,) weighs them.
    """
    factors = torch.rand(3, len(images), 1, 1, 1, device=images.device).mul_(2 * share).add_(1 - share)
    levels = images.to(torch.float32) * factors[0]
    mean = (levels * grey).sum(3, keepdim=True).mean((1, 2), keepdim=True)
    levels = mean + (levels - mean) * factors[1]
    greys = (levels * grey).sum(3, keepdim=True)
    levels = greys + (levels - greys) * factors[2]
    return levels.round_().clamp_(0, 255).to(torch.uint8)
