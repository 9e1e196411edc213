"""Conversion of a PyTorch module to float16, with float32 inputs and outputs.

PyTorch's kernels for LayerNorm, softmax, attention and pooling take float16 and accumulate in float32, so these layers
run in float16. BatchNorm keeps its parameters and statistics in float32, which its kernels mix with float16 inputs, as
they do under autocast. Activations are channels-last, the memory layout of tensor cores; otherwise float16 is three to
five times slower, on a CPU too.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifarx_export.formats.half_types import FLOAT16
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import Layout

FP16_SMALLEST_SUBNORMAL: Final = 2.0**-24
"""The smallest float16 above zero."""


class HalfPrecision(nn.Module):
    """Runs a float16 network on float32 images, and returns its outputs in float32.

    Args:
        network: the network.
        layout: the order of the axes of the images.
    """

    def __init__(self, network: nn.Module, layout: Layout = "NCHW") -> None:
        super().__init__()
        self.network = network
        self._memory_format = torch.channels_last if layout == "NCHW" else torch.contiguous_format

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.network(images.to(torch.float16, memory_format=self._memory_format))
        return outputs.float()


def convert_module_to_fp16(module: nn.Module, layout: Layout = "NCHW") -> nn.Module:
    """Return a float16 copy of a float32 network in eval mode, on the same device. `module` is not modified.

    Args:
        module: the network.
        layout: the order of the axes of its input.

    Raises:
        UsageError: a parameter or buffer is outside the range of float16.
    """
    network = deepcopy(module)
    for name, tensor in _fp16_tensors(network):
        if exceeds_fp16_range(tensor.detach().cpu().numpy()):
            raise UsageError(
                f"{name} has values up to {tensor.abs().max().item():.3g}, outside the range of float16, "
                f"{FP16_SMALLEST_SUBNORMAL:.1g} to {FLOAT16.largest:g}",
                "use --precision fp32, or --format onnx, which keeps it in float32",
            )
    for _, tensor in _fp16_tensors(network):
        tensor.data = tensor.data.half()
    return HalfPrecision(network, layout).eval()


def exceeds_fp16_range(values: NDArray[Any]) -> bool:
    """Return whether float16 would overflow on a tensor, or round all of it to zero.

    Values below the smallest subnormal are ignored if the tensor also has larger ones, because their
    contribution to a sum is negligible.
    """
    largest = float(np.abs(values).max(initial=0))
    return not (largest == 0 or FP16_SMALLEST_SUBNORMAL <= largest <= FLOAT16.largest)


def _fp16_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each parameter and buffer to convert, once, with the tensor."""
    kept = {
        id(tensor)
        for part in network.modules()
        if isinstance(part, _BatchNorm)
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    }
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.dtype == torch.float32 and id(tensor) not in kept:
            yield name, tensor
