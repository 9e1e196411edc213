"""GPTQ must preserve the outputs of a layer better than rounding to the nearest integer."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarx_export.formats.int8.gptq import QUANT_MAX, quantize_columns


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(64, 96), st.integers(2, 200))
def test_gptq_beats_rounding_to_the_nearest(seed: int, outputs: int, inputs: int) -> None:
    """Over all outputs together. For a single output it can be worse."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(outputs, inputs, generator=generator)
    rows = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    scales = weights.abs().amax(1) / QUANT_MAX
    levels = quantize_columns(weights, scales, rows.T @ rows)
    nearest = (weights / scales[:, None]).round()
    assert torch.equal(levels, levels.round())
    assert levels.abs().max() <= QUANT_MAX

    def output_error(integers: torch.Tensor) -> float:
        return float(((integers * scales[:, None] - weights) @ rows.T).square().sum())

    assert output_error(levels) <= 1.1 * output_error(nearest)
