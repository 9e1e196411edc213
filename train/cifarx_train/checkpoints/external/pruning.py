"""Fold the masks of pruned weights into the weights, as `torch.nn.utils.prune.remove` does."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from torch import Tensor

ORIGINAL: Final = "_orig"
"""The suffix of the name of a pruned weight before it is multiplied by its mask."""

_MASK: Final = "_mask"


class Folded(NamedTuple):
    """Tensors without masks, and how many of them were pruned."""

    tensors: dict[str, Tensor]
    pruned: int


def fold_masks(tensors: Mapping[str, Tensor]) -> Folded:
    """Replace each pair `weight_orig` and `weight_mask` by their product, `weight`."""
    folded: dict[str, Tensor] = {}
    count = 0
    for key, tensor in tensors.items():
        name = key.removesuffix(ORIGINAL)
        mask = tensors.get(name + _MASK)
        if key != name and mask is not None and mask.shape == tensor.shape:
            folded[name] = mask.to(tensor.dtype) * tensor
            count += 1
        elif not (key.endswith(_MASK) and f"{key.removesuffix(_MASK)}{ORIGINAL}" in tensors):
            folded[key] = tensor
    return Folded(folded, count)
