"""A split held on the training device as uint8 and batched there: no Python per image."""

import warnings
from collections.abc import Iterator, Sequence

import torch

from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages


class DeviceImages:
    """A split on a device. Takes N·height·width·3 bytes there: 184 MB for all of CIFAR-10."""

    def __init__(self, data: LabeledImages, device: torch.device) -> None:
        with warnings.catch_warnings():
            # Images mapped from a file are read-only; PyTorch warns that it cannot say so. Nothing writes here.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            self.images = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images uint8 (n, height, width, 3) and labels int64 (n,) on the device, for each int64 (n,) of `order`."""
        if not order:
            return
        everything = torch.cat(list(order)).to(self.labels.device)  # one copy, so that no step waits for its own
        for places in everything.split([len(chosen) for chosen in order]):
            yield self.images[places], self.labels[places]


class ToInput:
    """uint8 (N, H, W, 3) to the network's float32 input (N, 3, H, W).

    Gives the bits of `cifarx_serve.images.preprocess.scale`, in either memory layout.
    """

    def __init__(self, spec: InputSpec, device: torch.device, *, channels_last: bool = False) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._levels = torch.full((), 255.0, device=device)  # by a plain number, CUDA multiplies by the reciprocal
        self._low, self._high = spec.value_range
        self._normalises = any(spec.mean) or any(std != 1.0 for std in spec.std)
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        batch = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._format)
        batch.div_(self._levels)
        if (self._low, self._high) != (0.0, 1.0):
            batch.mul_(self._high - self._low).add_(self._low)
        if self._normalises:
            batch.sub_(self._mean).div_(self._std)
        return batch
