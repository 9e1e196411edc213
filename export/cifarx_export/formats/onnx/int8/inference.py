"""Running an ONNX model while it is being quantized."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto

_BATCH_SIZE: Final = 64

_MAX_ACTIVATION_BATCH_SIZE: Final = 32

_MAX_ACTIVATION_VALUES: Final = 2**25
"""Number of float32 values that all activations of a batch may have together: 128 MB."""


def open_session(model: ModelProto) -> Any:
    """Return an `onnxruntime.InferenceSession` on the CPU, with the graph optimizations of the runtime's default."""
    import onnxruntime

    from cifarx_serve.system.cpus import available_cpus

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = available_cpus()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_in_batches(session: Any, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the only output, (N, output_size), for inputs (N, *input.shape)."""
    starts = range(0, len(inputs), _BATCH_SIZE)
    return np.concatenate([session.run(None, {"input": inputs[start : start + _BATCH_SIZE]})[0] for start in starts])


def iterate_activations(
    model: ModelProto, names: Sequence[str], inputs: NDArray[np.float32]
) -> Iterator[Mapping[str, NDArray[np.float32]]]:
    """Yield the activations `names` of a model and its `input`, batch by batch."""
    tensors = float_tensors(model)
    observed = copy.deepcopy(model)
    existing = {value.name for value in [*observed.graph.input, *observed.graph.output]}
    observed.graph.output.extend(tensors[name] for name in names if name not in existing)
    outputs = [name for name in names if name != "input"]
    values_per_image = sum(elements_per_image(tensors[name]) for name in names)
    batch_size = max(1, min(_MAX_ACTIVATION_BATCH_SIZE, _MAX_ACTIVATION_VALUES // max(1, values_per_image)))
    session = open_session(observed)
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        values = session.run(outputs, {"input": batch}) if outputs else []  # no names stand for all outputs
        yield {"input": batch, **dict(zip(outputs, values, strict=True))}


def float_tensors(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Return the float32 activations by name, including the input and the output."""
    graph = model.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    return {value.name: value for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def elements_per_image(value: ValueInfoProto) -> int:
    """Return the number of elements of an activation for one image. An unknown axis counts as 1."""
    return math.prod(max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim[1:])
