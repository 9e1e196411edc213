"""A tiny model with known outputs: its logits are ten times the mean red, green and blue of the image."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.openvino import GRAPH_FILE, WEIGHTS_FILE
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.spec import InputSpec, ModelSpec

# Not square, so that a mix-up of height and width is noticed.
SPEC = ModelSpec(model="colors", class_names=("red", "green", "blue"), input=InputSpec(height=4, width=6))


def write_onnx(
    path: Path, document: str | bytes | None = SPEC.to_json(), order: Sequence[int] = (0, 1, 2), opset: int = 17
) -> Path:
    """Write the model as an ONNX file.

    Args:
        path: the file.
        document: the spec to embed; None for no spec.
        order: the channel of each class.
        opset: the opset version.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(10 * np.eye(3, dtype=np.float32)[:, list(order)], "weights")
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["means"]),
            helper.make_node("MatMul", ["means", "weights"], ["logits"]),
        ],
        "colors",
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


def write_openvino(
    path: Path, document: str | None = SPEC.to_json(), members: Mapping[str, bytes] = MappingProxyType({})
) -> Path:
    """Write the model as an OpenVINO file.

    Args:
        path: the file.
        document: the spec to embed; None for no spec.
        members: the content of members that replaces theirs.
    """
    import openvino

    model = openvino.Core().read_model(write_onnx(path).read_bytes())
    openvino.save_model(model, path.with_suffix(".xml"), compress_to_fp16=False)
    written = [path.with_suffix(suffix) for suffix in (".xml", ".bin")]
    content = dict(zip((GRAPH_FILE, WEIGHTS_FILE), (file.read_bytes() for file in written), strict=True))
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in {
            **content,
            **({} if document is None else {SPEC_FILE: document.encode()}),
            **members,
        }.items():
            archive.writestr(name, member)
    for file in written:
        file.unlink()
    return path


def write_relative_onnx(path: Path) -> Path:
    """Write an ONNX file whose logits are divided by the brightness, so that they are no numbers for a black image."""
    import onnx
    from onnx import helper

    model = onnx.load_model_from_string(write_onnx(path).read_bytes())
    nodes = list(model.graph.node)
    nodes[-1].input[0] = "shares"
    nodes[-1:-1] = [
        helper.make_node("ReduceMean", ["means"], ["brightness"], axes=[1], keepdims=1),
        helper.make_node("Div", ["means", "brightness"], ["shares"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path.write_bytes(model.SerializeToString())
    return path


def write_torchscript(path: Path, document: str | None = SPEC.to_json(), channels_last: bool = False) -> Path:
    """Write the model as a TorchScript file.

    Args:
        path: the file.
        document: the spec to embed; None for no spec.
        channels_last: whether the input is NHWC.
    """
    import warnings

    import torch

    class Colors(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 10 * images.mean((1, 2) if channels_last else (2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has deprecated the format
        shape = (2, 4, 6, 3) if channels_last else (2, 3, 4, 6)
        module = torch.jit.trace(Colors().eval(), torch.zeros(shape))
        torch.jit.save(module, str(path), _extra_files={} if document is None else {SPEC_FILE: document})
    return path
