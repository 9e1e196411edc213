"""Images and labels on the training device: batches, and the network's input. No Python code runs per image."""

import warnings
from collections.abc import Iterator, Sequence

import torch

from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.base import Loader


class DeviceLoader(Loader):
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

    def inputs(self, order: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor]]:
        """Yield the indices of each batch, int64 (n,), on the device."""
        for indices in self._upload(order):
            yield (indices,)

    def batch(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (indices,) = inputs
        return self.images[indices], self.labels[indices]


class InputTransform:
    """Converts images, uint8 (N, H, W, channels), to the network's input, float32 (N, *spec.shape), on the device.

    The result is bit-for-bit that of `cifarx_serve.images.preprocess.normalize`, in either memory format.

    Args:
        spec: provides the order of the channels and the axes, the value range, mean and std.
        device: the device of the images.
        channels_last: whether to return the input in channels-last memory format.
    """

    def __init__(self, spec: InputSpec, device: torch.device, *, channels_last: bool = False) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._levels = torch.full((), 255.0, device=device)  # CUDA would multiply by the reciprocal of a Python number
        self._low, self._high = spec.value_range
        self._reverses_channels = spec.color == "BGR"
        self._channels_first = spec.layout == "NCHW"
        self._normalize = any(spec.mean) or any(std != 1.0 for std in spec.std)
        shape = (-1, 1, 1) if self._channels_first else (-1,)
        self._mean = torch.tensor(spec.mean, device=device).view(shape)
        self._std = torch.tensor(spec.std, device=device).view(shape)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self._reverses_channels:
            images = images.flip(-1)
        if self._channels_first:
            batch = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._format)
        else:
            batch = images.to(torch.float32)
        batch.div_(self._levels)
        if (self._low, self._high) != (0.0, 1.0):
            batch.mul_(self._high - self._low).add_(self._low)
        if self._normalize:
            batch.sub_(self._mean).div_(self._std)
        return batch
