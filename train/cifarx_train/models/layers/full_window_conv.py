"""Faster convolutions on a CPU for inputs that are no larger than the kernel.

On 32x32 images, networks that were designed for photographs end in feature maps of one pixel. Eight of the nine weights
of a 3x3 kernel are then multiplied by padding only. This layer multiplies only the weights that cover the input, as one
matrix product. Its output is that of the convolution except for the order of the additions. On two cores, ResNet-34
trains 1.1 times as fast with a batch size of 64, because oneDNN spends most time on the gradients of such kernels.
"""

from torch import Tensor, nn
from torch.nn import functional


class FullWindowConv2d(nn.Conv2d):
    """A Conv2d that computes a matrix product if its output is one pixel and its kernel covers the whole input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name
        height, width = input.shape[2:]
        (kernel_height, kernel_width), (top, left) = self.kernel_size, map(int, self.padding)
        covers_input = kernel_height >= top + height and kernel_width >= left + width
        one_pixel = self._output_size(height, 0) == self._output_size(width, 1) == 1
        if not (covers_input and one_pixel):
            return super().forward(input)
        weight = self.weight[:, :, top : top + height, left : left + width]
        return functional.linear(input.flatten(1), weight.flatten(1), self.bias)[:, :, None, None]

    def _output_size(self, size: int, axis: int) -> int:
        """Return the size of the output along an axis; 0 or less if the kernel is larger than the padded input."""
        return (size + 2 * int(self.padding[axis]) - self.kernel_size[axis]) // self.stride[axis] + 1


def convert_full_window_convs(module: nn.Module) -> None:
    """Turn every plain Conv2d of a network into a FullWindowConv2d, in place. The names and weights do not change."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _is_plain(layer):
            layer.__class__ = FullWindowConv2d


def _is_plain(layer: nn.Conv2d) -> bool:
    return (
        layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
