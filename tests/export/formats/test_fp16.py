"""A network in float16: what changes inside, and what does not outside."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cifarx_export.formats.fp16 import LARGEST, SMALLEST, half_precision, is_lost_in_half
from cifarx_serve.errors import UsageError


def network() -> nn.Sequential:
    """A bit of each: convolution, both norms, softmax and a linear head."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_var.fill_(1e5)  # beyond float16
    norm.weight.data.fill_(300.0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 5)
    ).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))


def test_it_takes_and_gives_float32_and_computes_in_float16(images: torch.Tensor) -> None:
    half = half_precision(network())
    seen: list[torch.dtype] = []
    for part in half.modules():
        if isinstance(part, (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Linear)):
            part.register_forward_hook(lambda _module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.no_grad():
        logits = half(images)
    assert (logits.dtype, logits.shape) == (torch.float32, (4, 5))
    assert set(seen) == {torch.float16}
    assert len(seen) == 8


def test_it_nearly_answers_as_the_network(images: torch.Tensor) -> None:
    single = network()
    with torch.no_grad():
        logits, expected = half_precision(single)(images), single(images)
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)


def test_the_statistics_of_batch_norm_stay_float32() -> None:
    state = half_precision(network()).state_dict()
    assert state["network.1.running_var"].dtype == torch.float32
    assert state["network.1.running_var"].max() == 1e5
    assert state["network.0.weight"].dtype == torch.float16
    assert state["network.6.bias"].dtype == torch.float16


def test_the_network_itself_is_left_alone() -> None:
    single = network()
    before = {name: value.clone() for name, value in single.state_dict().items()}
    half = half_precision(single)
    assert not half.training
    for name, value in single.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_weights_that_two_parts_share_stay_shared() -> None:
    single = network()
    single.append(nn.Linear(5, 5))
    single.append(single[-1])
    half = half_precision(single.eval())
    assert half.get_submodule("network.7").weight is half.get_submodule("network.8").weight


@pytest.mark.parametrize("value", [1e5, -1e6, float("inf"), float("nan")])
def test_a_weight_that_float16_cannot_hold_is_named(value: float) -> None:
    single = network()
    single[6].weight.data[0, 0] = value
    with pytest.raises(UsageError, match=r"network\.6\.weight|6\.weight") as raised:
        half_precision(single)
    assert "--precision fp32" in raised.value.remedy


def test_a_weight_that_float16_would_make_zero() -> None:
    single = network()
    single[6].bias.data.fill_(1e-9)
    with pytest.raises(UsageError, match=r"6\.bias"):
        half_precision(single)


def test_it_can_be_exported_with_any_batch(images: torch.Tensor) -> None:
    half = half_precision(network())
    program = torch.export.export(half, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with torch.no_grad():
        for size in (1, 3):
            assert torch.equal(program.module()(images[:size]), half(images[:size]))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_what_is_not_lost_survives_the_cast(values: list[float]) -> None:
    array = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not is_lost_in_half(array):
        assert np.isfinite(half).all()
        assert half.any() == array.any()
        np.testing.assert_allclose(half, array, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize(
    ("values", "lost"),
    [
        ([], False),
        ([0.0], False),
        ([LARGEST], False),
        ([65520.0], True),
        ([SMALLEST], False),
        ([1e-9], True),
        ([1e-9, 1.0], False),
        ([1.0, 1e9], True),
        ([float("nan")], True),
    ],
)
def test_the_edges_of_float16(values: list[float], lost: bool) -> None:
    assert is_lost_in_half(np.array(values, np.float32)) is lost
