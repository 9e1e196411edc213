"""Images and labels on the training device: batches, and the network's input. No Python code runs per image."""

import warnings
from collections.abc import Iterator, Sequence

import torch

from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages


class DeviceLoader:
    """Loads batches from a split that is copied to the device as uint8: 184 MB for all of CIFAR-10.

    Args:
        data: the split.
        device: the training device.
    """

    def __init__(self, data: LabeledImages, device: torch.device) -> None:
        with warnings.catch_warnings():
            # Memory-mapped images are read-only, which PyTorch does not support. Nothing writes to this tensor.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            self.images = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the images, uint8 (n, height, width, 3), and labels, int64 (n,), of each batch on the device.

        Args:
            order: the indices of the images of each batch, int64 (n,).
        """
        if not order:
            return
        indices = torch.cat(list(order)).to(self.labels.device)  # one copy for all batches, so that no step waits
        for batch in indices.split([len(batch) for batch in order]):
            yield self.images[batch], self.labels[batch]


class InputTransform:
    """Converts images, uint8 (N, H, W, 3), to the network's input, float32 (N, 3, H, W), on the device.

    The result is bit-for-bit that of `cifarx_serve.images.preprocess.normalize`, in either memory format.

    Args:
        spec: provides the value range, mean and std.
        device: the device of the images.
        channels_last: whether to return the input in channels-last memory format.
    """

    def __init__(self, spec: InputSpec, device: torch.device, *, channels_last: bool = False) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._levels = torch.full((), 255.0, device=device)  # CUDA would multiply by the reciprocal of a Python number
        self._low, self._high = spec.value_range
        self._normalize = any(spec.mean) or any(std != 1.0 for std in spec.std)
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        batch = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._format)
        batch.div_(self._levels)
        if (self._low, self._high) != (0.0, 1.0):
            batch.mul_(self._high - self._low).add_(self._low)
        if self._normalize:
            batch.sub_(self._mean).div_(self._std)
        return batch
