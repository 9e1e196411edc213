import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cifarx_train.models.layers.full_window_conv import FullWindowConv2d, convert_full_window_convs
from cifarx_train.models.registry import get_architecture


@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_outputs_and_gradients_are_those_of_a_convolution(
    height: int, width: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    plain = nn.Conv2d(3, 5, kernel, stride, padding, bias=bias).double()
    converted = nn.Sequential(copy.deepcopy(plain))
    convert_full_window_convs(converted)
    images = torch.randn(4, 3, height, width, dtype=torch.float64)
    if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
        with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
            converted(images)
        return
    expected, output = plain(images), converted(images)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(expected)
    for gradient, expected_gradient in zip(
        torch.autograd.grad((output * weight).sum(), list(converted.parameters())),
        torch.autograd.grad((expected * weight).sum(), list(plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected_gradient)


def test_a_converted_network_keeps_its_keys_and_outputs() -> None:
    torch.manual_seed(0)
    plain = get_architecture("resnet18").build(10).eval()
    converted = copy.deepcopy(plain)
    convert_full_window_convs(converted)
    images = torch.randn(2, 3, 32, 32)
    assert converted.state_dict().keys() == plain.state_dict().keys()
    assert any(isinstance(layer, FullWindowConv2d) for layer in converted.modules())
    torch.testing.assert_close(converted(images), plain(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 4, 3),
    ],
    ids=["groups", "dilation", "same", "circular", "transposed"],
)
def test_other_convolutions_are_not_converted(layer: nn.Module) -> None:
    kind = type(layer)
    convert_full_window_convs(layer)
    assert type(layer) is kind
