"""Simulation of an ONNX model in float16 or bfloat16, where the result of every operator is rounded.

On a CPU, ONNX Runtime computes float16 in float32 and removes the casts between operators, so its results show neither
an overflow nor the rounding. The simulation is a float32 model with a cast to the type and back after every operator.
ONNX Runtime keeps those. An operator accumulates its own sums in float32, as the libraries of GPUs and CPUs do.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from cifarx_export.formats.activation_range import check_range
from cifarx_export.formats.half_types import HALF_TYPES, HalfType
from cifarx_export.formats.onnx.int8.inference import open_session
from cifarx_export.parity.checks import Check
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.errors import error_message
from cifarx_serve.scores import applicable_labels
from cifarx_serve.spec import ModelSpec, Precision

MAX_IMAGES: Final = 4096
"""Maximum number of images that a precision is simulated on: 0.1 % of them, a tolerance, are several images."""

_SCOPES: Final = "pkg.torch.onnx.name_scopes"
"""The key in a node's metadata for the names of the modules that it belongs to, as PyTorch's exporter writes it."""

_CAST_TYPES: Final[Mapping[str, int]] = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}

_BOUNDS: Final[Mapping[str, str]] = {"smallest": "ReduceMin", "largest": "ReduceMax"}

ReferenceBatch = tuple[NDArray[Any], NDArray[np.float32]]
"""A batch of images as the model takes them, and the outputs of the reference for it."""


class HalfPrecisionModel(NamedTuple):
    """A simulation.

    Attributes:
        model: from the input of the network to its output and then the smallest and the largest value of each
            activation, before it is rounded.
        layers: the name of the layer that computes each of these activations, by their names, in the order of
            execution.
    """

    model: ModelProto
    layers: Mapping[str, str]


def check_half_precision(
    model: ModelProto, precision: Precision, batches: Iterable[ReferenceBatch], spec: ModelSpec
) -> list[Check]:
    """Check that a model in half precision has the predictions of its reference, and that no activation overflows.

    Args:
        model: for fp16 a model in float16, whose operators in float32 are not rounded; for bf16 one in float32.
        precision: fp16 or bf16.
        batches: images and the outputs of the reference.
        spec: spec of the model.
    """
    half = HALF_TYPES[precision]
    name, minimum = f"{half.name} agreement", get_tolerance(precision).agreement
    simulation = simulate_half_precision(model, half)
    try:
        session = open_session(simulation.model)
    except Exception as error:  # the errors of ONNX Runtime have no common base class
        return [Check(name, False, f"cannot be simulated: {error_message(error)}")]
    largest = np.zeros(len(simulation.layers))
    images = same = 0
    changed: NDArray[Any] | None = None
    for batch, expected in batches:
        outputs, *bounds = session.run(None, {session.get_inputs()[0].name: batch})
        largest = np.fmax(largest, np.abs(np.array(bounds, np.float64).reshape(-1, 2)).max(axis=1))
        agrees = (applicable_labels(outputs, spec) == applicable_labels(expected, spec)).all(axis=1)
        agrees &= np.isfinite(outputs).all(axis=1)
        if changed is None and not agrees.all():
            changed = batch[~agrees][:1]
        same += int(agrees.sum())
        images += len(batch)
    range_check = check_range(_by_layer(simulation.layers.values(), largest), half)
    if not range_check.passed:
        return [range_check]
    agreement = same / images
    found = f"{agreement:.4%} of {images:,} images with activations rounded to {half.name} (minimum {minimum * 100:g}%)"
    if agreement < minimum and changed is not None:
        found += f"; {describe_loss(simulation, half, changed)}"
    return [range_check, Check(name, agreement >= minimum, found)]


def simulate_half_precision(model: ModelProto, half: HalfType) -> HalfPrecisionModel:
    """Return a simulation of a model. `model` is not modified.

    Args:
        model: for float16 a model whose float16 tensors are to be rounded; for bfloat16 one whose float32 tensors are.
            It has no functions.
        half: the type to round to.
    """
    simulated = onnx.shape_inference.infer_shapes(model)
    graph = simulated.graph
    rounded = _rounded_tensors(graph, TensorProto.FLOAT16 if half.name == "float16" else TensorProto.FLOAT)
    nodes: list[NodeProto] = []
    layers: dict[str, str] = {}
    weights = {tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        if tensor.name in rounded:
            name, tensor.name = tensor.name, f"{tensor.name}/exact"
            nodes += _rounding(tensor.name, name, half)
    if (image := graph.input[0].name) in rounded:
        nodes += _rounding(image, f"{image}/rounded", half)
        for node in graph.node:
            node.input[:] = [f"{image}/rounded" if name == image else name for name in node.input]
    for node in graph.node:
        nodes.append(node)
        _widen_attributes(node)
        for index, name in enumerate(node.output):
            if name in rounded:
                node.output[index] = f"{name}/exact"
                nodes += [*_bounds(f"{name}/exact"), *_rounding(f"{name}/exact", name, half)]
                layers[name] = layer_name(node, weights)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.output.extend(
        helper.make_tensor_value_info(f"{name}/exact/{bound}", TensorProto.FLOAT, [])
        for name in layers
        for bound in _BOUNDS
    )
    return HalfPrecisionModel(simulated, layers)


def _rounded_tensors(graph: GraphProto, data_type: int) -> Set[str]:
    values = [*graph.input, *graph.value_info, *graph.output]
    return {value.name for value in values if value.type.tensor_type.elem_type == data_type} | {
        tensor.name for tensor in graph.initializer if tensor.data_type == data_type
    }


def _widen_attributes(node: NodeProto) -> None:
    """Make a node compute in float32 what it computes in float16: a cast, or a constant."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT
        elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT16:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))


def layer_name(node: NodeProto, weights: Set[str] = frozenset()) -> str:
    """Return the name of the module that a node belongs to, or that of the node, with the operator.

    Args:
        node: the node.
        weights: the names of the weights of the graph, which name the module where the node does not.
    """
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")][:-1]  # the last is the node itself
    module = next((name for name in reversed(names) if name), "")
    owned = next((name.removesuffix(".weight") for name in node.input if name in weights and "." in name), "")
    return f"{module or owned or node.name} ({node.op_type})"


def describe_loss(simulation: HalfPrecisionModel, half: HalfType, image: NDArray[Any]) -> str:
    """Return where the rounding errors of an image grow most, from the inputs of a layer to its output.

    Args:
        simulation: from `simulate_half_precision`.
        half: the type that it rounds to.
        image: a batch of one image as the model takes it.
    """
    exact, rounded = (_run_layers(model, image) for model in (_without_rounding(simulation.model), simulation.model))
    errors = {name: _relative_error(exact[name], values) for name, values in rounded.items() if name in exact}
    described, largest = "no layer stands out", 1.0
    for node in simulation.model.graph.node:
        for name in (output.removesuffix("/exact") for output in node.output):
            if name not in simulation.layers or name not in errors:
                continue
            before = max([half.rounding, *(errors.get(read, 0.0) for read in node.input)])
            if errors[name] / before > largest:
                largest = errors[name] / before
                layer = simulation.layers[name]
                described = f"the errors grow most in {layer}, from {before:.2%} to {errors[name]:.2%} of its values"
    return described


def _without_rounding(model: ModelProto) -> ModelProto:
    """Return a simulation without its rounding. Weights that are stored in the type keep their values."""
    exact = copy.deepcopy(model)
    for node in exact.graph.node:
        if node.op_type == "Cast" and node.output[0].endswith("/half"):
            node.attribute[0].i = TensorProto.FLOAT
    return exact


def _run_layers(model: ModelProto, image: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """Return every float32 activation of a simulation that is not one of its own casts."""
    observed = copy.deepcopy(model)
    casts = tuple(f"/{suffix}" for suffix in ("exact", "half", *_BOUNDS))
    names = [name for node in observed.graph.node for name in node.output if name and not name.endswith(casts)]
    del observed.graph.output[:]
    observed.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = open_session(observed)
    values = session.run(names, {session.get_inputs()[0].name: image})
    return {name: array for name, array in zip(names, values, strict=True) if array.dtype == np.float32}


def _relative_error(exact: NDArray[np.float32], rounded: NDArray[np.float32]) -> float:
    """Return the L2 norm of the error over that of the values; infinity where it is not defined."""
    expected = exact.astype(np.float64)
    norm = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(rounded - expected))
    return error / norm if norm and np.isfinite(error) else (0.0 if error == 0 else float("inf"))


def _rounding(source: str, result: str, half: HalfType) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{result}/half"], to=_CAST_TYPES[half.name]),
        helper.make_node("Cast", [f"{result}/half"], [result], to=TensorProto.FLOAT),
    ]


def _bounds(name: str) -> Iterator[NodeProto]:
    for bound, operator in _BOUNDS.items():
        yield helper.make_node(operator, [name], [f"{name}/{bound}"], keepdims=0)


def _by_layer(layers: Iterable[str], values: NDArray[Any]) -> dict[str, float]:
    """Return the largest value of each layer, of which one can have several activations."""
    largest: dict[str, float] = {}
    for layer, value in zip(layers, values.tolist(), strict=True):
        largest[layer] = max(value, largest.get(layer, 0.0))
    return largest
