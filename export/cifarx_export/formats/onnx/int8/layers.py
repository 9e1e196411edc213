"""The layers of an ONNX network that do the work, what they cost, and running it."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

BATCH: Final = 64

_LEAST_COST: Final = 0.02
"""Of leaving any layer in fp32, as a share of the whole; the additions too cost no more, measured on ResNet-18."""


class Layer(NamedTuple):
    """What is quantized or left in fp32 together.

    Attributes:
        name: of its node, or what the nodes are.
        nodes: their names.
        cost: what it takes from the speed to leave them in fp32, as a share.
        weighted: they have weights.
    """

    name: str
    nodes: tuple[str, ...]
    cost: float
    weighted: bool = True


def find_layers(model: Any) -> list[Layer]:
    """Nodes with weights, in the graph's order; then the additions of shortcuts as one, with the ReLUs that follow.

    A layer's cost is its share of the activations, not of the multiplications: what is slow are the large tensors as
    floats and the ways to and from integers. On ResNet-18 at 32x32 and batch 64, AVX-512, the first convolution in
    fp32 took the speed-up from 1.53 to 1.23; the last three, with ten times its multiplications, raised it to 1.86.
    """
    activations = _activations(model)
    total = max(1, sum(activations.values()))
    layers = [Layer(name, (name,), count / total + _LEAST_COST) for name, count in activations.items()]
    additions = shortcut_additions(model)
    sums = {node.output[0] for node in additions}
    additions += [node for node in model.graph.node if node.op_type == "Relu" and node.input[0] in sums]
    names = tuple(node.name for node in additions)
    return [*layers, Layer("additions", names, _LEAST_COST, weighted=False)] if names else layers


def shortcut_additions(model: Any) -> list[Any]:
    """Additions of two activations, one of them a convolution's output.

    Others stay in fp32: a bias after a matrix product costs nothing there, and the sums of a transformer go to a
    normalisation, which takes floats. On a Swin they were 1.6 % of the agreement with every layer left in fp32.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    convolved = {name for node in model.graph.node if node.op_type == "Conv" for name in node.output}
    additions = (node for node in model.graph.node if node.op_type == "Add" and not weights.intersection(node.input))
    return [node for node in additions if convolved.intersection(node.input)]


def weighted_nodes(model: Any) -> list[Any]:
    """Convolutions and matrix products with constant weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights and node.input[0] not in weights
    ]


def macs_per_image(model: Any) -> dict[str, int]:
    """Multiplications of each node with weights, by its name; the model's shapes must be known."""
    size = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    outputs = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    found = {}
    for node in weighted_nodes(model):
        dims = [dim.dim_value for dim in outputs[node.output[0]].type.tensor_type.shape.dim][1:]  # 0 is unknown
        # An output value takes as many multiplications as its channel has weights.
        channels = shapes[node.input[1]][0] if node.op_type == "Conv" else dims[-1]
        found[node.name] = math.prod(dims) * size[node.input[1]] // max(1, channels)
    return found


def _activations(model: Any) -> dict[str, int]:
    """How many values of one image a layer takes and gives."""
    values = float_tensors(model)

    def count(name: str) -> int:
        return math.prod(max(1, dim.dim_value) for dim in values[name].type.tensor_type.shape.dim[1:])

    return {node.name: count(node.input[0]) + count(node.output[0]) for node in weighted_nodes(model)}


def float_tensors(model: Any) -> dict[str, Any]:
    """Value infos of the float32 activations by name, the input's and the output's among them."""
    graph = model.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    return {value.name: value for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def session(model: Any) -> Any:
    """On the CPU, at the optimization that the runtime gives the finished file."""
    import onnxruntime

    from cifarx_serve.system.cpus import available_cpus

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = available_cpus()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_in_batches(opened: Any, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits, (N, classes), of inputs (N, 3, height, width)."""
    starts = range(0, len(inputs), BATCH)
    return np.concatenate([opened.run(["logits"], {"input": inputs[start : start + BATCH]})[0] for start in starts])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The quantization library prints, warns and logs of its own insides; what matters it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
