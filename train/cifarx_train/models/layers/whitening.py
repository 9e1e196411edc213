"""A fixed first convolution that whitens 2x2 patches: its outputs are uncorrelated, and most of unit variance.

The idea is that of the CIFAR-10 speed records: what every first layer learns, uncorrelated views of small patches,
is known before training from the images alone, so that it need not be learned.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_SIDE = 2
_PATCH = 3 * _SIDE * _SIDE  # values in a patch
# Added to the variances, as a part of their mean, lest directions that hold only rounding noise be blown up. The value
# is that of the speed records; two of CIFAR-10's twelve directions vary less than it.
_FLOOR = 5e-4
_CHUNK = 256  # images at a time, so that the patches of 5,000 never lie in memory together


class Whitening(nn.Module):
    """Input (N, 3, H, W), output (N, 24, H - 1, W - 1): 12 filters and their negatives, fixed, and a trained bias.

    Both signs, so that a rectifier after it loses nothing. Until `fit`, the filters pick the patch's own values.

    Attributes:
        weight: float32 (24, 3, 2, 2), a buffer: stored with the weights, and no optimiser meets it.
        bias: float32 (24,), trained.
    """

    channels = 2 * _PATCH
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", _both_signs(torch.eye(_PATCH)).reshape(self.channels, 3, _SIDE, _SIDE))
        self.bias = nn.Parameter(torch.zeros(self.channels))

    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images, self.weight, self.bias)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Take the filters that whiten the patches of these images, and the bias that centres them.

        Args:
            images: network inputs, float32 (N, 3, H, W) with at least one patch, on any device.
        """
        mean, covariance = _moments(images)
        variances, directions = torch.linalg.eigh(covariance)  # ascending; one direction a column
        variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
        # An eigenvector is known but for its sign: the largest of its values is made positive, so that the same images
        # give the same filters whatever library solved it.
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        # The least float keeps images of one colour, which vary not at all, from dividing by zero.
        floor = _FLOOR * variances.mean() + torch.finfo(torch.float32).eps
        filters = (directions * largest.sign() / (variances + floor).sqrt()).T
        self.weight.copy_(_both_signs(filters).reshape(self.weight.shape))
        self.bias.copy_(_both_signs(-(filters @ mean)))


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (12,) and covariance (12, 12) of all 2x2 patches, float64 on the CPU, summed where the images are."""
    # float64 also because autocast and TF32 leave it alone; Apple's GPUs have none.
    exact = torch.float32 if images.device.type == "mps" else torch.float64
    count = 0
    total = torch.zeros(_PATCH, dtype=exact, device=images.device)
    products = torch.zeros(_PATCH, _PATCH, dtype=exact, device=images.device)
    for chunk in images.split(_CHUNK):
        patches = functional.unfold(chunk.to(exact), _SIDE).transpose(0, 1).flatten(1)
        count += patches.shape[1]
        total += patches.sum(1)
        products += patches @ patches.T
    mean = total.cpu().double() / count
    return mean, products.cpu().double() / count - torch.outer(mean, mean)


def _both_signs(filters: Tensor) -> Tensor:
    return torch.cat([filters, -filters])
