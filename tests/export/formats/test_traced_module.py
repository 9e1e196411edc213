"""The module that is traced leaves the images unchanged, and runs in the precision of the source."""

import msgspec
import pytest
import torch
from torch import Tensor, nn

from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource
from cifarx_export.formats.traced_module import CopiedInput, module_to_trace
from cifarx_serve.errors import UsageError
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec, Precision

SPEC = ModelSpec(model="small", class_names=tuple("abcde"), input=InputSpec(height=8, width=6))


class Network(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.head = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        images = images.sub_(0.5) if self.in_place else images - 0.5
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


def source(module: nn.Module, precision: Precision = "fp32") -> ConversionSource:
    spec = msgspec.structs.replace(SPEC, precision=precision)
    return ConversionSource(module.eval, spec, NO_OPTIONS, lambda count: pytest.fail(str(count)), silent)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_that_changes_its_input_gets_a_copy(precision: Precision) -> None:
    network = Network(in_place=True)
    converting = source(network, precision)
    traced, images = module_to_trace(converting), converting.example_input()
    with torch.no_grad():
        logits, expected = traced(images), network(images.clone())
    assert torch.equal(images, converting.example_input())
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)


def test_other_networks_are_traced_as_they_are() -> None:
    network = Network(in_place=False)
    assert module_to_trace(source(network)) is network
    assert not isinstance(module_to_trace(source(network, "fp16")), CopiedInput)


def test_a_network_that_does_not_run_is_reported() -> None:
    with pytest.raises(UsageError, match=r"^the network fails for images of shape 2 x 3 x 8 x 6 \(RuntimeError: "):
        module_to_trace(source(nn.Sequential(nn.Flatten(), nn.Linear(3, 5))))
