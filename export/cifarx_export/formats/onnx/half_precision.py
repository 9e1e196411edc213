"""Simulation of an ONNX model in float16 as a GPU computes it, where every activation is rounded to float16.

On a CPU, ONNX Runtime computes float16 in float32 and removes the casts between operators, so its results show neither
an overflow nor the rounding. The simulation is a float32 model with a cast to float16 and back after every operator.
ONNX Runtime keeps those.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from cifarx_export.formats.fp16_range import check_range
from cifarx_export.formats.onnx.int8.inference import float_tensors, open_session
from cifarx_export.parity.checks import Check
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.scores import applicable_labels
from cifarx_serve.spec import ModelSpec

_SCOPES: Final = "pkg.torch.onnx.name_scopes"
"""The key in a node's metadata for the names of the modules that it belongs to, as PyTorch's exporter writes it."""


class HalfPrecisionModel(NamedTuple):
    """A simulation.

    Attributes:
        model: from the input of the network to its output and then the smallest and the largest value of each
            activation, before it is rounded.
        layers: the name of each of these activations, in the order of execution.
    """

    model: ModelProto
    layers: tuple[str, ...]


def check_half_precision(
    model: ModelProto, fp32_nodes: Iterable[str], inputs: Iterable[NDArray[np.float32]], spec: ModelSpec
) -> list[Check]:
    """Check that a model has the same predictions in float16, and that no activation overflows.

    Args:
        model: the model in float32.
        fp32_nodes: names of the nodes that stay in float32.
        inputs: batches of images as the network takes them.
        spec: its spec.
    """
    simulation = simulate_half_precision(model, fp32_nodes)
    exact, half = open_session(model), open_session(simulation.model)
    largest = np.zeros(len(simulation.layers))
    images = same = 0
    for batch in inputs:
        expected = exact.run(None, {"input": batch})[0]
        outputs, *bounds = half.run(None, {"input": batch})
        values = np.abs(np.array(bounds, np.float64).reshape(-1, 2)).max(axis=1)
        largest = np.fmax(largest, values)
        labels = applicable_labels(outputs, spec) == applicable_labels(expected, spec)
        same += int((labels.all(axis=1) & np.isfinite(outputs).all(axis=1)).sum())
        images += len(batch)
    range_check = check_range(_by_layer(simulation.layers, largest))
    if not range_check.passed:
        return [range_check]
    agreement, minimum = same / images, get_tolerance("fp16").agreement
    found = f"{agreement:.4%} of {images:,} images with activations rounded to float16 (minimum {minimum * 100:g}%)"
    return [range_check, Check("float16 agreement", agreement >= minimum, found)]


def simulate_half_precision(model: ModelProto, fp32_nodes: Iterable[str]) -> HalfPrecisionModel:
    """Return a simulation of a model. `model` is not modified.

    Args:
        model: a model in float32 without functions, whose constants are initializers.
        fp32_nodes: names of the nodes that stay in float32.
    """
    simulated = onnx.shape_inference.infer_shapes(model)
    graph, kept = simulated.graph, frozenset(fp32_nodes)
    floats = set(float_tensors(simulated))
    read_in_half = {name for node in graph.node if node.name not in kept for name in node.input}
    _round_weights(simulated, kept)
    nodes: list[NodeProto] = []
    layers: dict[str, str] = {}
    if graph.input[0].name in read_in_half:
        nodes += _rounding(graph.input[0].name, f"{graph.input[0].name}/rounded")
        _rename_reads(graph.node, graph.input[0].name, f"{graph.input[0].name}/rounded")
    for node in graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in floats and (node.name not in kept or name in read_in_half):
                node.output[index] = f"{name}/exact"
                nodes += [*_bounds(f"{name}/exact"), *_rounding(f"{name}/exact", name)]
                layers[f"{name}/exact"] = layer_name(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.output.extend(
        helper.make_tensor_value_info(f"{name}/{bound}", TensorProto.FLOAT, []) for name in layers for bound in _BOUNDS
    )
    return HalfPrecisionModel(simulated, tuple(layers.values()))


_BOUNDS: Final[Mapping[str, str]] = {"smallest": "ReduceMin", "largest": "ReduceMax"}


def layer_name(node: NodeProto) -> str:
    """Return the name of the module that a node belongs to, or that of the node, with the operator."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")][:-1]  # the last is the node itself
    module = next((name for name in reversed(names) if name), "")
    return f"{module or node.name} ({node.op_type})"


def _rounding(source: str, result: str) -> list[NodeProto]:
    half = f"{result}/half"
    return [
        helper.make_node("Cast", [source], [half], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [half], [result], to=TensorProto.FLOAT),
    ]


def _bounds(name: str) -> Iterator[NodeProto]:
    for bound, operator in _BOUNDS.items():
        yield helper.make_node(operator, [name], [f"{name}/{bound}"], keepdims=0)


def _round_weights(model: ModelProto, kept: frozenset[str]) -> None:
    """Round the weights that only nodes in float16 read."""
    in_fp32 = {name for node in model.graph.node if node.name in kept for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in in_fp32:
            rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))


def _rename_reads(nodes: Iterable[NodeProto], old: str, new: str) -> None:
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]


def _by_layer(layers: tuple[str, ...], values: NDArray[Any]) -> dict[str, float]:
    """Return the largest value of each layer, of which one can have several activations."""
    largest: dict[str, float] = {}
    for layer, value in zip(layers, values.tolist(), strict=True):
        largest[layer] = max(value, largest.get(layer, 0.0))
    return largest
