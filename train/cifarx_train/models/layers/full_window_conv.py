"""Convolutions that multiply little but padding, on a CPU.

Networks made for photographs end, on images of 32x32 pixels, in maps of one pixel: of a 3x3 kernel eight taps see zeros
alone. Only the taps that see the map are multiplied here, as the one matrix product that is left. The answer is that of
the convolution but for the order of the sums. The notes' ResNet-34 at batch 64 trains 1.1 times as fast by it on two
cores: the gradient of a mostly idle kernel is what oneDNN spends most on.
"""

from torch import Tensor, nn
from torch.nn import functional


class OnePixelConv2d(nn.Conv2d):
    """A Conv2d that is a matrix product where its output is one pixel and its kernel covers the whole input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that PyTorch gives it
        height, width = input.shape[2:]
        (kernel_height, kernel_width), (top, left) = self.kernel_size, map(int, self.padding)
        covered = kernel_height >= top + height and kernel_width >= left + width
        one_pixel = self._outputs(height, 0) == self._outputs(width, 1) == 1
        if not (covered and one_pixel):
            return super().forward(input)
        taps = self.weight[:, :, top : top + height, left : left + width]
        return functional.linear(input.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]

    def _outputs(self, size: int, axis: int) -> int:
        """Pixels of the output along an axis; 0 or less where the kernel is larger than the padded input."""
        return (size + 2 * int(self.padding[axis]) - self.kernel_size[axis]) // self.stride[axis] + 1


def skip_padding(module: nn.Module) -> None:
    """Let every plain convolution of a network be an OnePixelConv2d; weights, names and answers stay as they are."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _is_plain(layer):
            layer.__class__ = OnePixelConv2d


def _is_plain(layer: nn.Conv2d) -> bool:
    return (
        layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
