"""A model small enough to know its answers: the logits are ten times the mean red, green and blue of the image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.torch.torchscript import SPEC_FILE
from cifarx_serve.spec import InputSpec, ModelSpec

# Not square, so that a height taken for a width is seen.
SPEC = ModelSpec(model="colours", class_names=("red", "green", "blue"), input=InputSpec(height=4, width=6))


def write_onnx(
    path: Path, document: str | bytes | None = SPEC.to_json(), order: Sequence[int] = (0, 1, 2), opset: int = 17
) -> Path:
    """The model as ONNX; `document` is the spec it carries, `order` the channel that each class answers to."""
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(10 * np.eye(3, dtype=np.float32)[:, list(order)], "weights")
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["means"]),
            helper.make_node("MatMul", ["means", "weights"], ["logits"]),
        ],
        "colours",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if document is not None:
        entry = model.metadata_props.add()
        entry.key = SPEC_KEY
        entry.value = document
    path.write_bytes(model.SerializeToString())
    return path


def write_torchscript(path: Path, document: str | None = SPEC.to_json()) -> Path:
    """The model as TorchScript; `document` is the spec it carries."""
    import warnings

    import torch

    class Colours(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 10 * images.mean((2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecated the format
        module = torch.jit.trace(Colours().eval(), torch.zeros(2, 3, 4, 6))
        torch.jit.save(module, str(path), _extra_files={} if document is None else {SPEC_FILE: document})
    return path
