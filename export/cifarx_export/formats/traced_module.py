"""The module that the formats of PyTorch are made from."""

import torch
from torch import Tensor, nn

from cifarx_export.formats.activation_range import check_module_range
from cifarx_export.formats.conversion_errors import reporting_run_errors
from cifarx_export.formats.fp16 import convert_module_to_fp16
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.parity.checks import Check


def module_to_trace(source: ConversionSource) -> nn.Module:
    """Return a new copy of the network in the precision of the source, which does not modify the images it is given.

    Raises:
        UsageError: a weight is outside the range of float16, or the network does not run.
    """
    module = source.build_module()
    if source.spec.precision == "fp16":
        return convert_module_to_fp16(module, source.spec.input.layout)
    images, example = source.example_input(), source.example_input()
    with reporting_run_errors(images), torch.no_grad():
        module(images)
    return module if torch.equal(images, example) else CopiedInput(module).eval()


def fp16_checks(source: ConversionSource) -> list[Check]:
    """Return what is checked about a network in float16. There is nothing to check in float32.

    Unlike ONNX Runtime, PyTorch computes float16 on a CPU too, so the parity check compares what a GPU will compute.
    """
    return [source.compute_once(check_module_range)] if source.spec.precision == "fp16" else []


class CopiedInput(nn.Module):
    """Gives a network a copy of the images, because it modifies them in place."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.network(images.clone())
        return outputs
