"""Conversion of an ONNX model to float16, with float32 inputs and outputs.

The conversion is that of ONNX Runtime, `onnxruntime.transformers.float16`. Operators whose sums or value ranges exceed
float16 stay in float32, and so does an operator with a constant outside the range of float16.
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

from cifarx_export.formats.fp16 import exceeds_fp16_range

_FP32_OPERATORS: Final = frozenset(
    {
        # Sums over whole feature maps, sums of squares, and exponentials.
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
        # ONNX Runtime has no float16 CPU kernels for these, and would insert casts anyway.
        "CumSum",
        "Einsum",
        "Max",
        "Min",
        "TopK",
    }
)


def convert_model_to_fp16(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """Convert a float32 model to float16. `model` is modified.

    The input and the output keep their names, types and dynamic axes.

    Returns:
        The model, and the operators that stay in float32 as `{"fp32 ops": "LayerNormalization, Softmax"}`, which is
        empty if there are none.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = lift_constants(model)
    kept = list(fp32_nodes(model))
    converted = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=[], node_block_list=[node.name for node in kept]
    )
    _drop_duplicate_casts(converted)
    _bypass_cast_pairs(converted)
    tidied = _apply(converted, TopologicalSortPass(), CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass())
    names = ", ".join(sorted({node.op_type for node in kept}))
    return tidied, {"fp32 ops": names} if names else {}


def lift_constants(model: ModelProto) -> ModelProto:
    """Return the model with its constants as initializers, which the choice of `fp32_nodes` reads."""
    lifted = _apply(model, LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0))
    _drop_initializer_value_infos(lifted)
    return lifted


def _apply(model: ModelProto, *passes: Any) -> ModelProto:
    """Return the model after passes of onnx_ir."""
    changed = onnx_ir.from_proto(model)
    for step in passes:
        step(changed)
    proto: ModelProto = onnx_ir.to_proto(changed)
    return proto


def _drop_initializer_value_infos(model: ModelProto) -> None:
    """Remove the value infos of initializers, which make the conversion treat those that stay float32 as float16."""
    constants = {tensor.name for tensor in model.graph.initializer}
    entries = [entry for entry in model.graph.value_info if entry.name not in constants]
    del model.graph.value_info[:]
    model.graph.value_info.extend(entries)


def fp32_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Yield the nodes that stay in float32, because of their operator or because of one of their constants."""
    out_of_range = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and exceeds_fp16_range(numpy_helper.to_array(tensor))
    }
    for node in model.graph.node:
        if node.op_type in _FP32_OPERATORS or out_of_range.intersection(node.input):
            yield node


def _drop_duplicate_casts(model: ModelProto) -> None:
    """Keep one cast per value: the conversion writes one for each node that reads it, all with the same name."""
    written: set[str] = set()
    for node in list(model.graph.node):
        if written.intersection(node.output):
            model.graph.node.remove(node)
        written.update(node.output)
    entries = {entry.name: entry for entry in model.graph.value_info}
    del model.graph.value_info[:]
    model.graph.value_info.extend(entries.values())


def _bypass_cast_pairs(model: ModelProto) -> None:
    """Read a float32 value directly if it was cast to float16 and back. The casts are then unused."""
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    originals: dict[str, str] = {}
    for output, cast in casts.items():
        before = casts.get(cast.input[0])
        if before is not None and (_cast_type(before), _cast_type(cast)) == (TensorProto.FLOAT16, TensorProto.FLOAT):
            originals[output] = before.input[0]
    for node in model.graph.node:
        node.input[:] = [originals.get(name, name) for name in node.input]
    for output in model.graph.output:
        if output.name in originals:
            model.graph.node.remove(casts[output.name])
            _rename(model, originals[output.name], output.name)


def _rename(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def _cast_type(cast: NodeProto) -> int:
    """Return the data type that a node casts to."""
    return next(int(attribute.i) for attribute in cast.attribute if attribute.name == "to")
