"""A loader of some of the images of another, and the split of the training images into those to train on and others."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cifarx_train.data.loaders.base import Loader


class SubsetLoader(Loader):
    """Loads batches of some images of another loader, without a copy of them.

    Args:
        loader: loads the images.
        indices: the indices of the images, int64 (N,), on the CPU.
    """

    def __init__(self, loader: Loader, indices: Tensor) -> None:
        self._loader, self._indices = loader, indices
        self.labels = loader.labels[indices.to(loader.labels.device)]

    def inputs(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        yield from self._loader.inputs([self._indices[batch] for batch in order])

    def batch(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self._loader.batch(*inputs)


def stratified_split(loader: Loader, fraction: float, seed: int) -> tuple[SubsetLoader, SubsetLoader]:
    """Split the images at random into those to keep and those to hold out.

    The fraction is that of every class, rounded, so that a class of few images keeps them.

    Args:
        loader: loads all of the images.
        fraction: the part to hold out.
        seed: decides which images.
    """
    labels = loader.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        held[members[: round(fraction * len(members))]] = True
    positions = torch.arange(len(labels))
    return SubsetLoader(loader, positions[~held]), SubsetLoader(loader, positions[held])
