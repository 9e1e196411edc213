"""ONNX in float16: the weights and the activations in between; `input` and `logits` stay float32.

The conversion is ONNX Runtime's own, `onnxruntime.transformers.float16`. Operators whose sums or ranges float16
does not hold stay float32, and so does one with a constant that float16 cannot say.
"""

from collections.abc import Iterator
from typing import Any, Final

import onnx_ir
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)

from cifarx_export.formats.fp16 import is_lost_in_half

_SINGLE: Final = frozenset(
    {
        # Sums over whole feature maps, their squares, and exponentials.
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LogSoftmax",
        "LpNormalization",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Softmax",
        # ONNX Runtime has no float16 kernel for these on a CPU, and converts around them anyway.
        "CumSum",
        "Einsum",
        "Max",
        "Min",
        "TopK",
    }
)


def to_half_precision(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """A float16 model of a float32 one, and what of it stayed float32.

    The input and the output keep their names, types and dynamic axes. The model given is changed.

    Returns:
        The model, and `{"fp32 ops": "LayerNormalization, Softmax"}`; nothing where all is float16.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = _with(model, LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0))
    _forget_constants(model)
    kept = list(_kept(model))
    half = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=[], node_block_list=[node.name for node in kept]
    )
    _drop_repeated(half)
    _join_casts(half)
    tidy = _with(half, TopologicalSortPass(), CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass())
    names = ", ".join(sorted({node.op_type for node in kept}))
    return tidy, {"fp32 ops": names} if names else {}


def _with(model: ModelProto, *passes: Any) -> ModelProto:
    changed = onnx_ir.from_proto(model)
    for step in passes:
        step(changed)
    proto: ModelProto = onnx_ir.to_proto(changed)
    return proto


def _forget_constants(model: ModelProto) -> None:
    """Drop the value infos of initializers: the conversion would take those that stay float32 for float16."""
    constants = {tensor.name for tensor in model.graph.initializer}
    entries = [entry for entry in model.graph.value_info if entry.name not in constants]
    del model.graph.value_info[:]
    model.graph.value_info.extend(entries)


def _kept(model: ModelProto) -> Iterator[NodeProto]:
    """The nodes that stay float32: by their operator, or for a constant of theirs."""
    lost = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and is_lost_in_half(numpy_helper.to_array(tensor))
    }
    for node in model.graph.node:
        if node.op_type in _SINGLE or lost.intersection(node.input):
            yield node


def _drop_repeated(model: ModelProto) -> None:
    """The conversion writes the cast of a value once for each node that reads it, each time under one name."""
    written: set[str] = set()
    for node in list(model.graph.node):
        if written.intersection(node.output):
            model.graph.node.remove(node)
        written.update(node.output)
    entries = {entry.name: entry for entry in model.graph.value_info}
    del model.graph.value_info[:]
    model.graph.value_info.extend(entries.values())


def _join_casts(model: ModelProto) -> None:
    """Read a float32 value itself where it was cast to float16 and back; what casts it is then unused."""
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    origins: dict[str, str] = {}
    for output, cast in casts.items():
        before = casts.get(cast.input[0])
        if before is not None and (_target(before), _target(cast)) == (TensorProto.FLOAT16, TensorProto.FLOAT):
            origins[output] = before.input[0]
    for node in model.graph.node:
        node.input[:] = [origins.get(name, name) for name in node.input]
    for output in model.graph.output:
        if output.name in origins:
            model.graph.node.remove(casts[output.name])
            _rename(model, origins[output.name], output.name)


def _rename(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def _target(cast: NodeProto) -> int:
    return next(int(attribute.i) for attribute in cast.attribute if attribute.name == "to")
