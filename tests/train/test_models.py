from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models import registry
from cifarx_train.models.registry import model_names, network, register_model


@pytest.fixture
def lzh() -> nn.Module:
    torch.manual_seed(0)
    return network("lzh").build(10)


def test_lzh_has_the_parameters_of_the_notes(lzh: nn.Module) -> None:
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


def test_lzh_has_the_layers_of_the_notes(lzh: nn.Module) -> None:
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
def test_lzh_gives_a_logit_a_class(count: int, classes: int) -> None:
    logits = network("lzh").build(classes)(torch.rand(count, 3, 32, 32))
    assert logits.shape == (count, classes)
    assert logits.dtype == torch.float32


def test_lzh_gives_logits_not_probabilities(lzh: nn.Module) -> None:
    logits = lzh(torch.rand(4, 3, 32, 32))
    assert not torch.allclose(logits.sum(1), torch.ones(4))
    assert (logits < 0).any()


def test_lzh_takes_32x32_pixels_in_0_to_1() -> None:
    assert network("lzh").input == InputSpec(
        height=32, width=32, value_range=(0.0, 1.0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )


def test_every_build_is_another_network() -> None:
    first, second = network("lzh").build(10), network("lzh").build(10)
    assert not torch.equal(first.state_dict()["model.0.weight"], second.state_dict()["model.0.weight"])


def test_the_names_are_sorted_and_each_is_a_network() -> None:
    names = model_names()
    assert "lzh" in names
    assert names == sorted(names)
    assert all(network(name).input.channels == 3 for name in names)


@pytest.mark.parametrize("name", ["lhz", "LZH", "lz"])
def test_an_unknown_name_is_told_the_nearest(name: str) -> None:
    with pytest.raises(UsageError, match="did you mean 'lzh'") as caught:
        network(name)
    assert repr(name) in caught.value.problem
    assert caught.value.exit_status == 2


def test_a_name_near_to_none_is_told_them_all() -> None:
    with pytest.raises(UsageError, match=r"known are .*lzh") as caught:
        network("transformer-xl")
    assert "did you mean" not in str(caught.value)


def test_a_registered_network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_networks", {})  # so that no other test meets this one's network

    @register_model("linear", InputSpec(height=4, width=5))
    def linear(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(60, classes))

    builder: Callable[[int], nn.Module] = linear
    assert network("linear").build is builder
    assert network("linear").input.width == 5
    assert model_names() == ["linear"]
