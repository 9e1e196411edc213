"""Quantization of weights with GPTQ, which preserves the outputs of a layer rather than its weights.

The method is from Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022. The weights of a layer are quantized column by column. The remaining columns are adjusted to compensate for the
quantization error, according to the correlations of the layer's inputs on the calibration images.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

QUANT_MAX: Final = 64
"""Largest quantized weight: weights of 7 bits are from -64 to 64."""

MAX_IN_FEATURES: Final = 4608
"""Most input features of a layer that GPTQ is applied to, because the Hessian has their square as its size (512
channels under a 3x3 kernel). The weights of larger layers are rounded to the nearest integer."""

_MAX_ROWS: Final = 16384
"""Number of input rows that the Hessian of a layer is computed from. The rows of a convolution are patches."""

_DAMPING: Final = 0.01
"""Fraction of the mean of the Hessian's diagonal that is added to the diagonal; from the paper."""

_BLOCK_SIZE: Final = 128
"""Number of columns after which the remaining columns are updated; from the paper."""


def rows_per_batch(batch: int, images: int) -> int:
    """Return how many input rows of a layer a batch contributes to its Hessian, for a number of images altogether."""
    return max(1, _MAX_ROWS * batch // images)


def linear_rows(activation: Tensor, limit: int) -> Tensor:
    """Return about `limit` of the rows that a linear layer multiplies by its weights: (rows, in_features)."""
    return _spread(activation.reshape(-1, activation.shape[-1]), limit)


def convolution_rows(
    activation: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    limit: int,
) -> Tensor:
    """Return about `limit` of the patches that a 2D convolution multiplies by its weights: (rows, in_features).

    Args:
        activation: the input of the layer, (N, channels, height, width).
        kernel, strides, dilations: for the height and the width.
        pads: at the top, left, bottom and right.
        limit: the number of patches, evenly spread.
    """
    positions = max(1, activation.shape[2] * activation.shape[3] // (strides[0] * strides[1]))
    activation = activation[:: max(1, len(activation) * positions // (4 * limit))]  # unfolding takes much memory
    top, left, bottom, right = pads
    padded = functional.pad(activation, (left, right, top, bottom))
    patches = functional.unfold(padded, tuple(kernel), tuple(dilations), stride=tuple(strides))
    return _spread(patches.transpose(1, 2).reshape(-1, patches.shape[1]), limit)


def _spread(rows: Tensor, limit: int) -> Tensor:
    return rows[:: max(1, len(rows) // limit)]


def quantize_columns(weights: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """Return quantized weights.

    Args:
        weights: the weights, float32 (out_features, in_features).
        scales: a scale for each output, (out_features,).
        hessian: the sum of x xᵀ over the input rows x, (in_features, in_features).

    Returns:
        Integers from -`QUANT_MAX` to `QUANT_MAX` as float32, (out_features, in_features).
    """
    inverse = _inverse_cholesky(hessian)
    remaining, levels = weights.clone(), torch.empty_like(weights)
    for start in range(0, weights.shape[1], _BLOCK_SIZE):
        stop = min(start + _BLOCK_SIZE, weights.shape[1])
        block, factor = remaining[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors = torch.empty_like(block)
        for column in range(stop - start):
            level = round_to_levels(block[:, column], scales)
            levels[:, start + column] = level
            errors[:, column] = (block[:, column] - level * scales) / factor[column, column]
            block[:, column:] -= errors[:, column, None] * factor[column, column:]
        remaining[:, stop:] -= errors @ inverse[start:stop, stop:]
    return levels


def round_to_levels(weights: Tensor, scales: Tensor) -> Tensor:
    """Return the nearest quantized weights, as float32."""
    return (weights / scales).round().clamp(-QUANT_MAX, QUANT_MAX)


def _inverse_cholesky(hessian: Tensor) -> Tensor:
    """Return the upper triangular R with Rᵀ R = H⁻¹, where H is the damped Hessian.

    R is the inverse of the upper triangular U with U Uᵀ = H, a Cholesky decomposition from the last row upwards.
    """
    damped = hessian.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp(min=1e-6))
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
    return inverse.float()
