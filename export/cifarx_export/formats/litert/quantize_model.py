"""Quantize a LiteRT model to int8, in a process of its own.

Its arguments are those of `main`: MODEL QUANTIZED OUTPUT WEIGHTS [IMAGES].
"""

import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from ai_edge_quantizer import calibrator, quantizer, recipe_manager
from ai_edge_quantizer.algorithm_manager import AlgorithmName
from ai_edge_quantizer.utils import qsv_utils
from numpy.typing import NDArray

from cifarx_export.formats.litert.model_bytes import INPUT, SIGNATURE, rewrite
from cifarx_serve.system.cpus import available_cpus

_WEIGHTS: Final = {"minmax": AlgorithmName.MIN_MAX_UNIFORM_QUANT, "OCTAV": AlgorithmName.OCTAV}
"""How the scale of a channel's weights is chosen: by the largest weight, or by the error (arXiv:2206.06501)."""

_DYNAMIC: Final = ("CONV_2D", "FULLY_CONNECTED")
"""The operators whose inputs are quantized at run time. LiteRT has no fast kernel for others: with DEPTHWISE_CONV_2D, a
MobileNetV3 takes 9 times as long as in float32."""

_FLOAT: Final = (
    "HARD_SWISH", "GELU", "SOFTMAX", "RSQRT", "SQUARED_DIFFERENCE", "SUB", "BATCH_MATMUL", "INPUT", "OUTPUT",
)  # fmt: skip
"""What stays in float32 in a model with fixed ranges: operators without a fast kernel, those of a normalization, and
the input and the output of the model."""

_BITS: Final = 8

Recipe = list[dict[str, Any]]


def main(model: Path, quantized: Path, output: str, weights: str, images: Path | None = None) -> None:
    """Quantize a model.

    Args:
        model: the model.
        quantized: the file to write.
        output: the name of the model's output.
        weights: how the scales of the weights are chosen: "minmax" or "OCTAV".
        images: a file of `numpy.save` with images as the network takes them. With them, the ranges of activations are
            fixed to the smallest and largest value on these images; without, they are those of each image at run time.
    """
    content, algorithm = model.read_bytes(), _WEIGHTS[weights]
    recipe = _dynamic(algorithm) if images is None else _static(algorithm, output)
    ranges = None if images is None else _ranges(content, recipe, np.load(images, allow_pickle=False))
    result = quantizer.Quantizer(bytearray(content), recipe).quantize(ranges, enable_progress_report=False)
    quantized.write_bytes(rewrite(bytes(result.quantized_model), output))


def _dynamic(algorithm: str) -> Recipe:
    """Return the recipe for int8 weights with one scale per channel, and activations that are quantized at run time."""
    manager = recipe_manager.RecipeManager()
    for operator in _DYNAMIC:
        manager.add_dynamic_config(".*", operator, _BITS, algorithm_key=algorithm)
    recipe: Recipe = manager.get_quantization_recipe()
    return recipe


def _static(algorithm: str, output: str) -> Recipe:
    """Return the recipe for int8 weights and activations. The last layer returns floats, which are not rounded."""
    manager = recipe_manager.RecipeManager()
    manager.add_static_config(".*", "*", _BITS, _BITS, algorithm_key=algorithm)
    manager.add_dynamic_config(f"^{output};?$", "FULLY_CONNECTED", _BITS, algorithm_key=algorithm)
    kept = {"regex": ".*", "algorithm_key": AlgorithmName.NO_QUANTIZE, "op_config": {}}
    return [*manager.get_quantization_recipe(), *({**kept, "operation": operator} for operator in _FLOAT)]


def _ranges(content: bytes, recipe: Recipe, images: NDArray[np.float32]) -> dict[str, Any]:
    """Return the ranges of the activations. The default of the library, averages over the images, cuts peaks off."""
    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(recipe)
    found = calibrator.Calibrator(content, num_threads=available_cpus(), qsv_update_func=qsv_utils.min_max_update)
    found.calibrate({SIGNATURE: [{INPUT: image[None]} for image in images]}, manager)
    ranges: dict[str, Any] = found.get_model_qsvs()
    return ranges


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], *map(Path, sys.argv[5:]))
