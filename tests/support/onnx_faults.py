"""Faults to plant in a valid ONNX file. Each edits the model proto."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.spec import ModelSpec

Edit = Callable[[onnx.ModelProto], None]
Weights = NDArray[np.float32]


def edited(source: Path, edits: Iterable[Edit]) -> Path:
    """Write a copy of an ONNX file with faults to the current folder."""
    model = onnx.load(source)
    for edit in edits:
        edit(model)
    onnx.save(model, "edited.onnx")
    return Path("edited.onnx")


# The spec.


def spec_with(change: Callable[[ModelSpec], ModelSpec]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == SPEC_KEY)
        entry.value = change(ModelSpec.from_json(entry.value, "test")).to_json()

    return edit


def fields_with(**changes: object) -> Edit:
    return spec_with(lambda spec: msgspec.structs.replace(spec, **changes))


def input_with(**changes: object) -> Edit:
    return spec_with(lambda spec: msgspec.structs.replace(spec, input=msgspec.structs.replace(spec.input, **changes)))


def permuted_classes(spec: ModelSpec) -> ModelSpec:
    names = spec.class_names
    return msgspec.structs.replace(spec, class_names=(names[1], names[0], *names[2:]))


# The weights.


def weights_with(name: str, change: Callable[[Weights], Weights]) -> Edit:
    """Change the weights of the tensor called `name`, or of all tensors if it is empty."""

    def edit(model: onnx.ModelProto) -> None:
        tensors = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and name in {t.name, ""}]
        assert tensors
        for tensor in tensors:
            values = np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy()))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return edit


def entry_with(index: tuple[int, ...], change: Callable[[float], float], name: str) -> Edit:
    def one(values: Weights) -> Weights:
        values[index] = change(float(values[index]))
        return values

    return weights_with(name, one)


def tf32(values: Weights) -> Weights:
    """Round float32 to TF32, the format of tensor cores: 10 bits of mantissa instead of 23."""
    rounded: Weights = ((values.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    return rounded


# The graph.


def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


Nodes = Callable[[], list[onnx.NodeProto]]
Constants = dict[str, NDArray[np.generic]]


def output_through(
    nodes: Nodes, constants: Constants | None = None, shape: tuple[int | str, ...] | None = None
) -> Edit:
    """Rename the output to `raw` and compute `logits` from it by `nodes`, which may use `input` too."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        last = next(node for node in graph.node if "logits" in node.output)
        last.output[0] = "raw"
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (constants or {}).items())
        graph.node.extend(nodes())
        if shape is not None:
            graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))

    return edit


def input_through(nodes: Nodes, constants: Constants | None = None, kind: int = TensorProto.FLOAT) -> Edit:
    """Compute `changed` from `input` by `nodes` and make it the input of the network."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        for consumer in graph.node:
            consumer.input[:] = ["changed" if name == "input" else name for name in consumer.input]
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (constants or {}).items())
        for position, new in enumerate(nodes()):
            graph.node.insert(position, new)
        graph.input[0].type.tensor_type.elem_type = kind

    return edit


def frozen_batch(size: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for value in [*model.graph.input, *model.graph.output]:
            value.type.tensor_type.shape.dim[0].dim_value = size
        del model.graph.value_info[:]

    return edit


def output_type(kind: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        output_through(lambda: [node("Cast", "raw", "logits", to=kind)])(model)
        model.graph.output[0].type.tensor_type.elem_type = kind

    return edit


def input_type(kind: int) -> Edit:
    return input_through(lambda: [node("Cast", "input", "changed", to=TensorProto.FLOAT)], kind=kind)


def input_renamed(model: onnx.ModelProto) -> None:
    input_through(lambda: [node("Identity", "images", "changed")])(model)
    model.graph.input[0].name = "images"


def output_renamed(model: onnx.ModelProto) -> None:
    output_through(lambda: [node("Identity", "raw", "scores")])(model)
    model.graph.output[0].name = "scores"


def output_sequence(model: onnx.ModelProto) -> None:
    output_through(lambda: [node("SequenceConstruct", "raw", "logits")])(model)
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("logits", TensorProto.FLOAT, None))


def mean_baked(mean: float) -> Edit:
    return input_through(lambda: [node("Sub", "input baked", "changed")], {"baked": np.array([mean], np.float32)})


def channels_swapped() -> Edit:
    return input_through(
        lambda: [node("Gather", "input bgr", "changed", axis=1)], {"bgr": np.array([2, 1, 0], np.int64)}
    )


def quantized(scale: float) -> Edit:
    """Quantize the input with the given scale; 1/255 is the right one."""
    return input_through(
        lambda: [
            node("QuantizeLinear", "input scale zero", "levels"),
            node("DequantizeLinear", "levels scale zero", "changed"),
        ],
        {"scale": np.array(scale, np.float32), "zero": np.array(0, np.uint8)},
    )


def softmaxed() -> Edit:
    return output_through(lambda: [node("Softmax", "raw", "logits", axis=1)])


def dropout() -> Edit:
    return output_through(
        lambda: [node("Dropout", "raw ratio training", "logits", seed=0)],
        {"ratio": np.array(0.1, np.float32), "training": np.array(True)},
    )


def rounded_to_float16() -> Edit:
    return output_through(
        lambda: [
            node("Cast", "raw", "half", to=TensorProto.FLOAT16),
            node("Cast", "half", "logits", to=TensorProto.FLOAT),
        ]
    )


def first_for_all() -> Edit:
    """Return the logits of the first image for every image of the batch, like a broadcast batch of one."""
    return output_through(
        lambda: [
            node("Gather", "raw first", "one", axis=0),
            node("Shape", "raw", "size"),
            node("Expand", "one size", "logits"),
        ],
        {"first": np.array([0], np.int64)},
    )


def rows_shifted() -> Edit:
    """Return the logits of the next image for every image of the batch."""
    return output_through(
        lambda: [
            node("Slice", "raw one all rows", "others"),
            node("Slice", "raw none one rows", "first"),
            node("Concat", "others first", "logits", axis=0),
        ],
        {
            "none": np.array([0], np.int64),
            "one": np.array([1], np.int64),
            "all": np.array([2**31 - 1], np.int64),
            "rows": np.array([0], np.int64),
        },
    )


def wrong_at_batch(size: int) -> Edit:
    """Add 0.01 to the logits, only in batches of this size."""
    return output_through(
        lambda: [
            node("Shape", "input", "size", start=0, end=1),
            node("Equal", "size fault_size", "is_fault"),
            node("Cast", "is_fault", "fault", to=TensorProto.FLOAT),
            node("Mul", "fault fault_step", "step"),
            node("Add", "raw step", "logits"),
        ],
        {"fault_size": np.array([size], np.int64), "fault_step": np.array([0.01], np.float32)},
    )


def nan_for_black() -> Edit:
    """Multiply the logits by maximum / maximum of the image, which is 1, but NaN for a black image."""
    return output_through(
        lambda: [
            node("ReduceMax", "input not_batch", "maximum", keepdims=0),
            node("Div", "maximum maximum", "one"),
            node("Unsqueeze", "one last", "weight"),
            node("Mul", "raw weight", "logits"),
        ],
        {"not_batch": np.array([1, 2, 3], np.int64), "last": np.array([1], np.int64)},
    )


def batch_mean_subtracted() -> Edit:
    """Subtract the mean over the batch, as a BatchNorm in training mode does."""
    return output_through(
        lambda: [node("ReduceMean", "raw first", "mean", keepdims=1), node("Sub", "raw mean", "logits")],
        {"first": np.array([0], np.int64)},
    )
