"""Tiny ONNX models for any spec: their logits are known functions of the mean of each channel of the input."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.spec import InputSpec, ModelSpec

RGB = InputSpec(height=4, width=6)
BGR = InputSpec(height=4, width=6, color="BGR")
GRAYSCALE = InputSpec(height=4, width=6, channels=1, color="L")


def make_spec(
    input_spec: InputSpec = RGB, class_names: tuple[str, ...] = ("red", "green", "blue"), **fields: object
) -> ModelSpec:
    """Return a spec; `fields` are those of `ModelSpec`."""
    return ModelSpec(model="means", class_names=class_names, input=input_spec, **fields)  # type: ignore[arg-type]


def channel_weights(spec: ModelSpec) -> NDArray[np.float32]:
    """Return the weight of each channel in each output, (channels, output_size).

    Output n has a weight of 10 for channel n, in the order of the network, and -10 for the channel after it.
    """
    weights = np.zeros((spec.input.channels, spec.output_size), np.float32)
    for output in range(spec.output_size):
        weights[output % spec.input.channels, output] += 10
        weights[(output + 1) % spec.input.channels, output] -= 10
    return weights if spec.input.channels > 1 else np.linspace(10, -10, spec.output_size, dtype=np.float32)[None]


def write_model(path: Path, spec: ModelSpec, document: str | None = None) -> Path:
    """Write an ONNX file.

    Args:
        path: the file.
        spec: the spec. Its input decides the shape of the input, and its output the name and the values of the output.
        document: the spec to embed; by default that one.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = channel_weights(spec)
    embedded, first = spec.embedded_preprocessing, spec.input.layout == "NCHW"
    axes = [1, 2] if embedded or not first else [2, 3]
    shape: list[int | str] = (
        ["batch", "height", "width", spec.input.channels] if embedded else ["batch", *spec.input.shape]
    )
    activation = {"softmax": "Softmax", "sigmoid": "Sigmoid"}[spec.activation]
    nodes = [
        helper.make_node("Cast", ["input"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers"], ["means"], axes=axes, keepdims=0),
        helper.make_node("Div", ["means", "scale"], ["levels"]),
        helper.make_node("MatMul", ["levels", "weights"], ["sums"]),
        helper.make_node("Identity" if spec.output == "logits" else activation, ["sums"], [spec.output]),
    ]
    scale = np.array(255 if embedded else 1, np.float32)
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("input", TensorProto.UINT8 if embedded else TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(spec.output, TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(scale, "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key = SPEC_KEY
    entry.value = document or spec.to_json()
    path.write_bytes(model.SerializeToString())
    return path
