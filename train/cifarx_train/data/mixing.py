"""Mixup and CutMix: combine each image with the next one of its batch, and their labels in the same proportion.

Zhang et al. 2018, "mixup: beyond empirical risk minimization"; Yun et al. 2019, "CutMix: regularization strategy to
train strong classifiers with localizable features".
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Beta

from cifarx_train.recipes import Recipe


class MixedLabels(NamedTuple):
    """The labels of images that were made of two.

    Attributes:
        first, second: the labels, int64 (N,).
        weight: the share of the first, float32 (N,).
    """

    first: Tensor
    second: Tensor
    weight: Tensor


Targets: TypeAlias = Tensor | MixedLabels
"""What the images of a batch show: labels, int64 (N,), or those of mixed images."""


def select_targets(targets: Targets, part: slice) -> Targets:
    """Return what a part of the images shows."""
    return MixedLabels(*(value[part] for value in targets)) if isinstance(targets, MixedLabels) else targets[part]


class Mixing:
    """Mixup, CutMix, or for each image one of them at random.

    Args:
        recipe: provides `mixup` and `cutmix`, of which at least one is above 0.
        device: the device of the images.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        # The parameters are moved to the device here: a CUDA graph cannot capture such a copy.
        self._mixup, self._cutmix = (
            Beta(torch.full((), alpha, device=device), torch.full((), alpha, device=device), False) if alpha else None
            for alpha in (recipe.mixup, recipe.cutmix)
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, MixedLabels]:
        """Return the mixed images and their labels.

        Args:
            images: uint8 (N, H, W, channels).
            labels: int64 (N,).
        """
        others, count = images.roll(1, 0), len(images)
        if self._mixup is None or self._cutmix is None:
            mixing = self._mixup or self._cutmix
            assert mixing is not None, "one of the two is above 0"
            mix = mixup if self._mixup else cutmix
            mixed, weight = mix(images, others, mixing.sample((count,)))
        else:
            blended, blend_weight = mixup(images, others, self._mixup.sample((count,)))
            cut, cut_weight = cutmix(images, others, self._cutmix.sample((count,)))
            is_cut = torch.rand(count, device=images.device) < 0.5
            mixed = torch.where(is_cut[:, None, None, None], cut, blended)
            weight = torch.where(is_cut, cut_weight, blend_weight)
        return mixed, MixedLabels(labels, labels.roll(1, 0), weight)


def mixup(images: Tensor, others: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted means of pairs of images, rounded, and the weights of the first.

    Args:
        images, others: uint8 (N, H, W, channels).
        weight: float32 (N,).
    """
    factor = weight[:, None, None, None]
    return (images * factor + others * (1.0 - factor)).round_().to(torch.uint8), weight


def cutmix(images: Tensor, others: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a random rectangle of each other image, and return the share of the pixels that each image keeps.

    Args:
        images, others: uint8 (N, H, W, channels).
        weight: the share of the pixels to keep, float32 (N,). A rectangle that extends beyond the border is smaller.
    """
    height, width = images.shape[1:3]
    share = (1.0 - weight).sqrt()[:, None]
    rows = random_span(height, share * height)
    columns = random_span(width, share * width)
    inside = rows[:, :, None] & columns[:, None, :]
    mixed = torch.where(inside[..., None], others, images)
    return mixed, 1.0 - inside.float().mean((1, 2))


def random_span(size: int, length: Tensor) -> Tensor:
    """Return masks along an axis, bool (N, size), that are true around a random pixel and end at the border.

    Args:
        size: the length of the axis.
        length: of the spans, float32 (N, 1).
    """
    center = torch.rand_like(length) * size
    middles = torch.arange(size, device=length.device) + 0.5
    return (middles - center).abs() < length / 2
