"""A fixed first convolution that whitens 2x2 patches: its outputs are uncorrelated, most of them with unit variance.

The idea comes from the CIFAR-10 speed records: the first layer of any network learns decorrelated views of small
patches. These can be computed from the images before training, so they need not be learned.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_SIDE = 2
_PATCH = 3 * _SIDE * _SIDE  # values in a patch
# Added to the variances, relative to their mean, so that directions that contain only rounding noise are not amplified.
# The value is that of the speed records. Two of CIFAR-10's twelve directions have a smaller variance.
_EPSILON = 5e-4
_CHUNK = 256  # images per step, so that the patches of 5,000 images are never in memory at once


class Whitening(nn.Module):
    """Maps (N, 3, H, W) to (N, 24, H - 1, W - 1) with 12 fixed filters and their negatives, and a trained bias.

    The negatives preserve the information that a rectifier after this layer would remove. Before `fit` is called, the
    filters return the values of the patch.

    Attributes:
        weight: float32 (24, 3, 2, 2). A buffer, so it is part of the state dict and is not optimized.
        bias: float32 (24,), trained.
    """

    channels = 2 * _PATCH
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", _with_negatives(torch.eye(_PATCH)).reshape(self.channels, 3, _SIDE, _SIDE))
        self.bias = nn.Parameter(torch.zeros(self.channels))

    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images, self.weight, self.bias)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Set the filters that whiten the patches of these images, and the bias that centers them.

        Args:
            images: network inputs, float32 (N, 3, H, W), with at least one patch, on any device.
        """
        mean, covariance = _patch_statistics(images)
        variances, directions = torch.linalg.eigh(covariance)  # in ascending order; each column is a direction
        variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
        # The sign of an eigenvector is arbitrary. Its largest value is made positive, so that the filters do not depend
        # on the linear algebra library.
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        # The machine epsilon prevents a division by zero for images of a single color, which have no variance.
        epsilon = _EPSILON * variances.mean() + torch.finfo(torch.float32).eps
        filters = (directions * largest.sign() / (variances + epsilon).sqrt()).T
        self.weight.copy_(_with_negatives(filters).reshape(self.weight.shape))
        self.bias.copy_(_with_negatives(-(filters @ mean)))


def _patch_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (12,) and covariance (12, 12) of all 2x2 patches, float64 on the CPU.

    The sums are computed on the device of the images.
    """
    # Another reason for float64 is that autocast and TF32 do not apply to it. Apple's GPUs do not support it.
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    count = 0
    total = torch.zeros(_PATCH, dtype=dtype, device=images.device)
    products = torch.zeros(_PATCH, _PATCH, dtype=dtype, device=images.device)
    for chunk in images.split(_CHUNK):
        patches = functional.unfold(chunk.to(dtype), _SIDE).transpose(0, 1).flatten(1)
        count += patches.shape[1]
        total += patches.sum(1)
        products += patches @ patches.T
    mean = total.cpu().double() / count
    return mean, products.cpu().double() / count - torch.outer(mean, mean)


def _with_negatives(filters: Tensor) -> Tensor:
    return torch.cat([filters, -filters])
