"""The base class of the loaders."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch


class Loader(ABC):
    """Forms batches of a split on the training device.

    A batch is loaded in two parts: `inputs` yields what comes from the host, and `batch` does the rest on the device,
    where a CUDA graph can capture it.

    Attributes:
        labels: the labels of the split, int64 (N,), on the device.
    """

    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def inputs(self, order: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the arguments of `batch` for each batch. All of them have the batch as their first dimension.

        Args:
            order: the indices of the images of each batch, int64 (n,), on the CPU.
        """

    @abstractmethod
    def batch(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images, uint8 (n, height, width, channels), and labels, int64 (n,), of a batch on the device.

        Args:
            inputs: what `inputs` yielded.
        """

    def batches(self, order: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the images and labels of each batch. See `inputs` and `batch`."""
        for inputs in self.inputs(order):
            yield self.batch(*inputs)

    def _upload(self, order: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the indices of each batch on the device. They are copied at once, so that no step waits for a copy."""
        if not order:
            return []
        return list(torch.cat(list(order)).to(self.labels.device).split([len(batch) for batch in order]))
