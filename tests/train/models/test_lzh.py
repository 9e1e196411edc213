import pytest
import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.spec import InputSpec
from cifarx_train.models.registry import get_architecture


@pytest.fixture
def lzh() -> nn.Module:
    torch.manual_seed(0)
    return get_architecture("lzh").build(10)


def test_the_parameters_are_those_of_the_training_notes(lzh: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in lzh.state_dict().items()}
    assert shapes == {
        "model.0.weight": (32, 3, 5, 5),
        "model.0.bias": (32,),
        "model.2.weight": (32, 32, 5, 5),
        "model.2.bias": (32,),
        "model.4.weight": (64, 32, 5, 5),
        "model.4.bias": (64,),
        "model.7.weight": (64, 1024),
        "model.7.bias": (64,),
        "model.8.weight": (10, 64),
        "model.8.bias": (10,),
    }
    assert sum(parameter.numel() for parameter in lzh.parameters() if parameter.requires_grad) == 145_578


def test_the_layers_are_those_of_the_training_notes(lzh: nn.Module) -> None:
    weights = list(lzh.state_dict().values())
    images = torch.rand(3, 3, 32, 32)
    expected = images
    for weight, bias, side in zip(weights[0:6:2], weights[1:6:2], (16, 8, 4), strict=True):
        expected = functional.max_pool2d(functional.conv2d(expected, weight, bias, padding=2), 2)
        assert expected.shape[2:] == (side, side)
    expected = functional.linear(expected.flatten(1), weights[6], weights[7])
    expected = functional.linear(expected, weights[8], weights[9])
    assert torch.equal(lzh(images), expected)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("classes", [2, 10])
def test_one_logit_per_class(count: int, classes: int) -> None:
    logits = get_architecture("lzh").build(classes)(torch.rand(count, 3, 32, 32))
    assert logits.shape == (count, classes)
    assert logits.dtype == torch.float32


def test_outputs_are_logits_and_not_probabilities(lzh: nn.Module) -> None:
    logits = lzh(torch.rand(4, 3, 32, 32))
    assert not torch.allclose(logits.sum(1), torch.ones(4))
    assert (logits < 0).any()


def test_the_default_input_is_32x32_in_0_to_1() -> None:
    assert get_architecture("lzh").input == InputSpec(
        height=32, width=32, value_range=(0.0, 1.0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )


def test_every_build_returns_new_weights() -> None:
    first, second = get_architecture("lzh").build(10), get_architecture("lzh").build(10)
    assert not torch.equal(first.state_dict()["model.0.weight"], second.state_dict()["model.0.weight"])
