"""PyTorch modules in float16: float16 inside, float32 inputs and outputs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cifarx_export.formats.fp16 import (
    FP16_SMALLEST_SUBNORMAL,
    convert_module_to_fp16,
    exceeds_fp16_range,
)
from cifarx_export.formats.half_types import FLOAT16
from cifarx_serve.errors import UsageError


def network() -> nn.Sequential:
    """Return a network with a convolution, both kinds of normalization and a linear head."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.get_buffer("running_var").fill_(1e5)  # beyond float16
    norm.weight.data.fill_(300.0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 5)
    ).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))


def test_inputs_and_outputs_are_float32_and_layers_compute_in_float16(images: torch.Tensor) -> None:
    fp16 = convert_module_to_fp16(network())
    dtypes: list[torch.dtype] = []
    for part in fp16.modules():
        if isinstance(part, (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Linear)):
            part.register_forward_hook(lambda _module, inputs, output: dtypes.extend([inputs[0].dtype, output.dtype]))
    with torch.no_grad():
        logits = fp16(images)
    assert (logits.dtype, logits.shape) == (torch.float32, (4, 5))
    assert set(dtypes) == {torch.float16}
    assert len(dtypes) == 8


def test_logits_are_close_to_float32(images: torch.Tensor) -> None:
    fp32 = network()
    with torch.no_grad():
        logits, expected = convert_module_to_fp16(fp32)(images), fp32(images)
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)


def test_batch_norm_statistics_stay_float32() -> None:
    state = convert_module_to_fp16(network()).state_dict()
    assert state["network.1.running_var"].dtype == torch.float32
    assert state["network.1.running_var"].max() == 1e5
    assert state["network.0.weight"].dtype == torch.float16
    assert state["network.6.bias"].dtype == torch.float16


def test_the_original_network_is_not_modified() -> None:
    fp32 = network()
    before = {name: value.clone() for name, value in fp32.state_dict().items()}
    fp16 = convert_module_to_fp16(fp32)
    assert not fp16.training
    for name, value in fp32.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_shared_weights_stay_shared() -> None:
    fp32 = network()
    fp32.append(nn.Linear(5, 5))
    fp32.append(fp32[-1])
    fp16 = convert_module_to_fp16(fp32.eval())
    assert fp16.get_submodule("network.7").weight is fp16.get_submodule("network.8").weight


@pytest.mark.parametrize("value", [1e5, -1e6, float("inf"), float("nan")])
def test_a_weight_that_overflows_float16_is_named(value: float) -> None:
    fp32 = network()
    fp32.get_parameter("6.weight").data[0, 0] = value
    message = r"^6\.weight has values up to .*, outside the range of float16, 6e-08 to 65504: use --precision fp32"
    with pytest.raises(UsageError, match=message):
        convert_module_to_fp16(fp32)


def test_a_weight_that_underflows_to_zero_is_refused() -> None:
    fp32 = network()
    fp32.get_parameter("6.bias").data.fill_(1e-9)
    with pytest.raises(UsageError, match=r"6\.bias"):
        convert_module_to_fp16(fp32)


def test_it_can_be_exported_with_a_dynamic_batch(images: torch.Tensor) -> None:
    fp16 = convert_module_to_fp16(network())
    program = torch.export.export(fp16, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with torch.no_grad():
        for size in (1, 3):
            assert torch.equal(program.module()(images[:size]), fp16(images[:size]))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_tensors_in_range_survive_the_cast(values: list[float]) -> None:
    array = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not exceeds_fp16_range(array):
        assert np.isfinite(half).all()
        assert half.any() == array.any()
        np.testing.assert_allclose(half, array, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize(
    ("values", "exceeds"),
    [
        ([], False),
        ([0.0], False),
        ([FLOAT16.largest], False),
        ([65520.0], True),
        ([FP16_SMALLEST_SUBNORMAL], False),
        ([1e-9], True),
        ([1e-9, 1.0], False),
        ([1.0, 1e9], True),
        ([float("nan")], True),
    ],
)
def test_the_limits_of_the_range(values: list[float], exceeds: bool) -> None:
    assert exceeds_fp16_range(np.array(values, np.float32)) is exceeds
