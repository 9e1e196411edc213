"""Inserting QuantizeLinear and DequantizeLinear (QDQ) nodes into an ONNX graph."""

import copy
from collections.abc import Sequence
from typing import Final

from onnx import GraphProto, ModelProto, NodeProto

from cifarx_export.formats.int8.calibration import Ranges
from cifarx_export.formats.onnx.int8.inference import float_tensors
from cifarx_export.formats.onnx.int8.layers import residual_additions
from cifarx_export.formats.quiet import quiet

_INT8_OPERATORS: Final = (
    "Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "Reshape", "Flatten",
)  # fmt: skip
"""Operators with int8 CPU kernels in ONNX Runtime, and operators that pass integers through unchanged.

Softmax, normalization and gating (HardSwish, Mul) stay in fp32: they are a small part of the work and cause a large
part of the error."""

_FLOAT_OUTPUT: Final = ("Gemm", "MatMul")
"""Operators whose output may stay in fp32 if no int8 operator follows."""

_RANGE_PRESERVING: Final = ("MaxPool", "AveragePool", "Reshape", "Flatten")
"""Operators whose output has the range of their input."""


def nodes_to_quantize(model: ModelProto) -> list[NodeProto]:
    """Return the nodes that can run in int8. Of the additions, these are the residual ones."""
    additions = [node.name for node in residual_additions(model)]
    nodes = (node for node in model.graph.node if node.op_type in _INT8_OPERATORS)
    return [node for node in nodes if node.op_type != "Add" or node.name in additions]


def tensors_to_calibrate(model: ModelProto) -> list[str]:
    """Return the names of the activations that `insert_qdq` needs the ranges of."""
    activations = float_tensors(model)
    nodes = [node for node in nodes_to_quantize(model) if node.op_type not in _RANGE_PRESERVING]
    names = [name for node in nodes for name in node.input]
    names += [name for node in nodes if node.op_type not in _FLOAT_OUTPUT for name in node.output]
    return [name for name in dict.fromkeys(names) if name in activations]


def insert_qdq(model: ModelProto, ranges: Ranges, fp32_nodes: Sequence[str] = ()) -> ModelProto:
    """Return the model with QDQ nodes around each node that can run in int8, except the named `fp32_nodes`.

    Activations are uint8 with one scale and zero point per tensor. Weights are int8 of 7 bits with one scale per output
    channel and no zero point.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    with quiet():
        quantizer = QDQQuantizer(
            copy.deepcopy(model),
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, dict(ranges)),
            nodes_to_quantize=[node.name for node in nodes_to_quantize(model)],
            nodes_to_exclude=list(fp32_nodes),
            op_types_to_quantize=list(_INT8_OPERATORS),
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(_FLOAT_OUTPUT)},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    result: ModelProto = quantizer.model.model
    _remove_qdq_between(result.graph, frozenset(fp32_nodes))
    _strip_library_metadata(result, model)
    return result


def _remove_qdq_between(graph: GraphProto, fp32_nodes: frozenset[str]) -> None:
    """Remove the QDQ pairs between two nodes in fp32.

    If one reader of a value runs in int8, the library quantizes the value for all of its readers. Without these pairs,
    the sums of a ResNet's residual connections are quantized only where they enter a convolution.
    """
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for index, name in enumerate(node.input if node.name in fp32_nodes else ()):
            dequantize = producers.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = producers.get(dequantize.input[0])
            if quantize is None or quantize.op_type != "QuantizeLinear":
                continue  # weights are stored as integers
            producer = producers.get(quantize.input[0])
            if producer is not None and producer.name in fp32_nodes:
                node.input[index] = quantize.input[0]
    for operator in ("DequantizeLinear", "QuantizeLinear"):
        read = {name for node in graph.node for name in node.input}
        unused = [node for node in graph.node if node.op_type == operator and node.output[0] not in read]
        for node in unused:
            graph.node.remove(node)


def _strip_library_metadata(model: ModelProto, original: ModelProto) -> None:
    """Remove the quantization library's metadata, and the operator domains that it imports but does not use."""
    used = {node.domain for node in model.graph.node}
    domains = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    del model.metadata_props[:]
    del model.graph.value_info[:]
