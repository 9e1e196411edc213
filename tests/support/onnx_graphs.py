"""Small ONNX graphs, and what PyTorch and ONNX Runtime compute from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from cifarx_export.onnx_network.network import OnnxNetwork

CHANNELS = 4
SIDE = 6
SHAPE = (CHANNELS, SIDE, SIDE)


def graph_of(nodes: Sequence[NodeProto], constants: Mapping[str, Any] | None = None, opset: int = 17) -> ModelProto:
    """Return a model from `input`, float32 (batch, CHANNELS, SIDE, SIDE), to `output`."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def operator_of(name: str, constants: Sequence[Any] = (), *, opset: int = 17, **attributes: Any) -> ModelProto:
    """Return a model of one operator, whose further inputs are constants; None for one that is left out."""
    inputs = ["input", *("" if value is None else f"c{number}" for number, value in enumerate(constants))]
    given = {f"c{number}": value for number, value in enumerate(constants) if value is not None}
    return graph_of([helper.make_node(name, inputs, ["output"], **attributes)], given, opset)


def assert_same_outputs(
    model: ModelProto, *, batch_sizes: Sequence[int] = (1, 2, 5), is_exported: bool = False
) -> None:
    """Compare PyTorch with ONNX Runtime, also after an export with a variable batch size if `is_exported`."""
    network = OnnxNetwork(model, SHAPE).eval()
    computed: list[Any] = [network]
    if is_exported:
        example = (torch.from_numpy(random_images(2)),)
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        computed.append(torch.export.export(network, example, dynamic_shapes=sizes).module())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in batch_sizes:
        images = random_images(size)
        expected = session.run(None, {"input": images})[0]
        for function in computed:
            with torch.no_grad():
                found = function(torch.from_numpy(images))
            assert found.shape == expected.shape
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def random_images(count: int) -> NDArray[np.float32]:
    """Return values around zero: float32 (count, CHANNELS, SIDE, SIDE)."""
    return np.random.default_rng(count).normal(0, 2, (count, *SHAPE)).astype(np.float32)


def random_weights(*shape: int) -> NDArray[np.float32]:
    """Return weights, the same ones for each shape."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
