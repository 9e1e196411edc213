"""A network that computes in float16 and looks like its float32 self from outside.

PyTorch's kernels for LayerNorm, softmax, attention and pooling take float16 and add up in float32, so they run in
half. BatchNorm keeps its statistics in float32, which its kernels mix with float16 inputs, as under autocast.
Images lie channels last, the layout of tensor cores; without it float16 is three to five times slower on a CPU too.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifarx_serve.errors import UsageError

LARGEST: Final = 65504.0
"""Of float16, finite (IEEE 754 binary16)."""

SMALLEST: Final = 2.0**-24
"""Of float16, subnormal and above zero."""


class HalfPrecision(nn.Module):
    """Float32 (N, 3, height, width) in, float32 logits (N, classes) out, float16 in between."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.to(torch.float16, memory_format=torch.channels_last))
        return logits.float()


def half_precision(module: nn.Module) -> nn.Module:
    """A float16 copy of a float32 network in eval mode, on its device; the network itself is left as it was.

    Raises:
        UsageError: a weight that float16 cannot hold.
    """
    network = deepcopy(module)
    for name, tensor in _converted(network):
        if is_lost_in_half(tensor.detach().cpu().numpy()):
            raise UsageError(
                f"{name} goes up to {tensor.abs().max().item():.3g}, and float16 from {SMALLEST:.1g} to {LARGEST:g}",
                "use --precision fp32, or --format onnx, which keeps it in float32",
            )
    for _, tensor in _converted(network):
        tensor.data = tensor.data.half()
    return HalfPrecision(network).eval()


def is_lost_in_half(values: NDArray[Any]) -> bool:
    """Whether float16 overflows on a tensor or has nothing but zeros for it.

    Single values below the smallest subnormal, beside larger ones, are zeros to the sum they are part of.
    """
    largest = float(np.abs(values).max(initial=0))
    return not (largest == 0 or SMALLEST <= largest <= LARGEST)


def _converted(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that become float16, each once, by name."""
    single = {
        id(tensor)
        for part in network.modules()
        if isinstance(part, _BatchNorm)
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    }
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.dtype == torch.float32 and id(tensor) not in single:
            yield name, tensor
