"""Fold the constants of an ONNX model with ONNX Runtime."""

import tempfile
from pathlib import Path

import onnx
from onnx import ModelProto

from cifarx_export.formats.quiet import quiet


def fold_constants(model: ModelProto) -> ModelProto:
    """Return the model with constants folded, batch normalization folded into convolutions, and shapes inferred."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():  # the library reads and writes files
        original, prepared = Path(folder) / "given.onnx", Path(folder) / "prepared.onnx"
        onnx.save(model, original)
        quant_pre_process(original, prepared, skip_symbolic_shape=True)  # the inference of ONNX itself is sufficient
        result = onnx.load(prepared)
    result.ir_version = model.ir_version
    return result
