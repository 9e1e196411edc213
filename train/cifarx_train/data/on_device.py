"""A split held on the training device as uint8 and batched there: no Python per image."""

from collections.abc import Iterator

import torch

from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabelledImages


class DeviceImages:
    """A split on a device. Takes N·3·height·width bytes there: 184 MB for all of CIFAR-10."""

    def __init__(self, data: LabelledImages, spec: InputSpec, device: torch.device) -> None:
        # Channels first once, not for every batch.
        self.images = torch.from_numpy(data.images).to(device).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(data.labels).to(device)
        self.spec = spec

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, order: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs float32 (n, 3, height, width) and labels int64 (n,), in `order` or as they are stored."""
        if order is None:
            for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
                yield to_input(images, self.spec), labels
        else:
            for chosen in order.to(self.images.device).split(batch_size):
                yield to_input(self.images[chosen], self.spec), self.labels[chosen]


def to_input(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """uint8 (N, 3, H, W) to the network's float32 input, with the bits of `cifarx_serve.preprocess.scale`."""
    batch = images.to(torch.float32)
    batch.div_(torch.full((), 255.0, device=batch.device))  # by a plain number, CUDA multiplies by the reciprocal
    low, high = spec.value_range
    if (low, high) != (0.0, 1.0):
        batch.mul_(high - low).add_(low)
    if any(spec.mean) or any(std != 1.0 for std in spec.std):
        mean = torch.tensor(spec.mean, device=batch.device).view(1, 3, 1, 1)
        std = torch.tensor(spec.std, device=batch.device).view(1, 3, 1, 1)
        batch.sub_(mean).div_(std)
    return batch
