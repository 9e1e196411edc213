"""TrivialAugment and RandAugment on whole batches: every image gets its own operation and strength, without a loop.

Müller and Hutter 2021, "TrivialAugment: tuning-free yet state-of-the-art data augmentation"; Cubuk et al. 2020,
"RandAugment: practical automated data augmentation with a reduced search space". The operations, their ranges and the
rounding are those of torchvision's `TrivialAugmentWide` and `RandAugment`, except that images are sheared around their
center, translations are at most 150/331 of a side, as in RandAugment, and pixels from outside get the fill color.
"""

import math
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

AutoAugmentName: TypeAlias = Literal["trivial", "rand"]

OPERATIONS: Final = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_SIGNED: Final = frozenset(OPERATIONS[1:10])
_BINS: Final = 31
_LEVELS: Final = 256
_MAX_TRANSLATION: Final = 150 / 331  # of a side


class _Space(NamedTuple):
    """The largest strength of each operation, and how many operations an image gets.

    Attributes:
        shear: the tangent of the angle.
        translation: in pixels.
        degrees: of the rotation.
        factor: the change of brightness, color, contrast and sharpness.
        bits: how many bits are cleared.
        operations: the number of operations in a row.
        bin: the strength of every operation, from 0 to 30; None for a random one.
    """

    shear: float
    translation: float
    degrees: float
    factor: float
    bits: float
    operations: int
    bin: int | None


_SPACES: Final = {
    "trivial": _Space(0.99, 32.0, 135.0, 0.99, 6.0, 1, None),
    "rand": _Space(0.3, math.inf, 30.0, 0.9, 4.0, 2, 9),
}


class Choice(NamedTuple):
    """The operation of each image.

    Attributes:
        operation: positions in `OPERATIONS`, int64 (N,).
        value: the strength of each operation, float32 (N,): the tangent of a shear, pixels of a translation, radians of
            a rotation, the change of a factor, the number of cleared bits, or how far the threshold of solarization is
            below 255, as a fraction of it.
    """

    operation: Tensor
    value: Tensor

    def value_of(self, name: str) -> Tensor:
        """Return the strength of an operation for each image, float32 (N, 1, 1), which is 0 for other operations."""
        return torch.where(self.operation == OPERATIONS.index(name), self.value, 0.0)[:, None, None]

    def is_any(self, *names: str) -> Tensor:
        """Return whether each image gets one of these operations, bool (N, 1, 1)."""
        selected = torch.zeros_like(self.operation, dtype=torch.bool)
        for name in names:
            selected |= self.operation == OPERATIONS.index(name)
        return selected[:, None, None]


class AutoAugment:
    """Applies random operations to images. Takes and returns uint8 (N, H, W, channels).

    Args:
        name: "trivial" for TrivialAugment, "rand" for RandAugment with two operations of strength 9 of 30.
        size: the height and width of the images.
        fill: the color of pixels from outside the image, uint8 (channels,), on the device.
        luma_weights: the weights of the channels in the luma, float32 (channels,), on the device.
    """

    def __init__(self, name: AutoAugmentName, size: tuple[int, int], fill: Tensor, luma_weights: Tensor) -> None:
        space = _SPACES[name]
        self._space, self._fill, self._luma_weights = space, fill, luma_weights
        height, width = (min(space.translation, _MAX_TRANSLATION * side) for side in size)
        degrees, factor = math.radians(space.degrees), space.factor
        largest = (0, space.shear, space.shear, width, height, degrees, *4 * (factor,), space.bits, 1.0, 0, 0)
        # Tensors of Python numbers are made here: a CUDA graph cannot capture their copy to the device.
        self._largest = torch.tensor(largest, device=fill.device)
        self._signed = torch.tensor([name in _SIGNED for name in OPERATIONS], device=fill.device)

    def __call__(self, images: Tensor) -> Tensor:
        count, device = len(images), images.device
        for _ in range(self._space.operations):
            operation = torch.randint(len(OPERATIONS), (count,), device=device)
            sign = torch.where((torch.rand(count, device=device) < 0.5) & self._signed[operation], -1.0, 1.0)
            if self._space.bin is None:
                strength = torch.randint(_BINS, (count,), device=device) / (_BINS - 1)
            else:
                strength = torch.full((count,), self._space.bin / (_BINS - 1), device=device)
            value = sign * strength * self._largest[operation]
            images = apply_operations(images, Choice(operation, value), self._fill, self._luma_weights)
        return images


def apply_operations(images: Tensor, choice: Choice, fill: Tensor, luma_weights: Tensor) -> Tensor:
    """Apply to each image its operation. For the arguments see `AutoAugment`. The images are not changed."""
    return _look_up(_blend(_move(images, choice, fill), choice, luma_weights), choice)


def _move(images: Tensor, choice: Choice, fill: Tensor) -> Tensor:
    """Shear, translate and rotate. Each output pixel is the nearest pixel of the image."""
    count, height, width, _ = images.shape
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    x = torch.arange(width, device=images.device)[None, None, :] - middle_x
    y = torch.arange(height, device=images.device)[None, :, None] - middle_y
    angle = choice.value_of("rotate")
    cosine, sine = angle.cos(), angle.sin()
    source_x = cosine * x - sine * y + choice.value_of("shear_x") * y - choice.value_of("translate_x").trunc()
    source_y = sine * x + cosine * y + choice.value_of("shear_y") * x - choice.value_of("translate_y").trunc()
    columns, rows = (source_x + middle_x).round_().long(), (source_y + middle_y).round_().long()
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    index = torch.arange(count, device=images.device)[:, None, None]
    found = images[index, rows.clamp_(0, height - 1), columns.clamp_(0, width - 1)]
    return torch.where(inside[..., None], found, fill)


def _blend(images: Tensor, choice: Choice, luma_weights: Tensor) -> Tensor:
    """Change brightness, color, contrast and sharpness: blend with black, gray, the mean gray, or a blurred image."""
    levels = images.to(torch.float32)
    luma = (levels * luma_weights).sum(3, keepdim=True).floor_()
    other = torch.where(choice.is_any("color")[..., None], luma, 0.0)
    other = torch.where(choice.is_any("contrast")[..., None], luma.mean((1, 2), keepdim=True), other)
    other = torch.where(choice.is_any("sharpness")[..., None], _blur(levels), other)
    is_blended = choice.is_any("brightness", "color", "contrast", "sharpness")[..., None]
    factor = (1.0 + choice.value)[:, None, None, None]
    blended = (levels * factor + other * (1.0 - factor)).clamp_(0, 255).to(torch.uint8)
    return torch.where(is_blended, blended, images)


def _blur(levels: Tensor) -> Tensor:
    """Return the images blurred by Pillow's SMOOTH filter. Pixels at the border are unchanged, as in Pillow."""
    if min(levels.shape[1:3]) < 3:
        return levels
    channels_first = levels.permute(0, 3, 1, 2)
    neighbors = functional.avg_pool2d(channels_first, 3, stride=1) * 9
    blurred = ((neighbors + 4 * channels_first[:, :, 1:-1, 1:-1]) / 13).round_()
    result = channels_first.clone()
    result[:, :, 1:-1, 1:-1] = blurred
    return result.permute(0, 2, 3, 1)


def _look_up(images: Tensor, choice: Choice) -> Tensor:
    """Posterize, solarize, autocontrast and equalize: map every level of a channel to another one."""
    count, height, width, channels = images.shape
    indices = images.permute(0, 3, 1, 2).flatten(2).long()
    same = torch.arange(_LEVELS, device=images.device).expand(count, channels, _LEVELS)
    block = torch.exp2(choice.value_of("posterize").round()).long()
    threshold = 255.0 * (1.0 - choice.value_of("solarize"))
    table = same // block * block
    table = torch.where(choice.is_any("solarize") & (same >= threshold), 255 - same, table)
    table = torch.where(choice.is_any("autocontrast"), _autocontrast_table(indices, same), table)
    table = torch.where(choice.is_any("equalize"), _equalize_table(indices, same), table)
    mapped = table.to(torch.uint8).gather(2, indices)
    return mapped.view(count, channels, height, width).permute(0, 2, 3, 1).contiguous()


def _autocontrast_table(indices: Tensor, same: Tensor) -> Tensor:
    """Return the tables that stretch the levels of each channel to 0 to 255, int64 (N, channels, 256)."""
    low, high = indices.amin(2, keepdim=True), indices.amax(2, keepdim=True)
    stretched = ((same - low) / ((high - low) * (1 / 255))).clamp(0, 255).long()
    return torch.where(high > low, stretched, same)


def _equalize_table(indices: Tensor, same: Tensor) -> Tensor:
    """Return the tables that make the levels of each channel equally frequent, as `PIL.ImageOps.equalize` does."""
    counts = torch.zeros_like(same, memory_format=torch.contiguous_format)
    counts.scatter_add_(2, indices, torch.ones_like(indices))
    brightest = counts.gather(2, indices.amax(2, keepdim=True))
    step = (indices.shape[2] - brightest) // 255
    below = counts.cumsum(2) - counts
    equalized = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    return torch.where(step > 0, equalized, same)
