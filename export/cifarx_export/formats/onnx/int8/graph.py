"""An ONNX network with QuantizeLinear and DequantizeLinear around what is to run in integers."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from cifarx_export.formats.onnx.int8.calibration import Ranges
from cifarx_export.formats.onnx.int8.layers import float_tensors, quiet, shortcut_additions

_OPERATIONS: Final = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "Reshape", "Flatten")
"""What ONNX Runtime's CPU kernels run in int8, and what integers pass through unchanged. Softmax, normalisation and
tolerances (HardSwish, Mul) stay in fp32: they are a small part of the work and a large part of the error."""

_FLOAT_OUTPUT: Final = ("Gemm", "MatMul")
"""May end in fp32, where nothing follows that takes integers."""

_PASSING: Final = ("MaxPool", "AveragePool", "Reshape", "Flatten")
"""Have the range of what they take."""


def prepare(model: Any) -> Any:
    """Constants folded, shapes known; by way of files, as the library will have it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        given, prepared = Path(folder) / "given.onnx", Path(folder) / "prepared.onnx"
        onnx.save(model, given)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)  # ONNX's own inference knows these networks
        found = onnx.load(prepared)
    found.ir_version = model.ir_version
    return found


def integer_nodes(model: Any) -> list[Any]:
    """What is to run in integers: of the additions, those of shortcuts alone."""
    additions = [node.name for node in shortcut_additions(model)]
    nodes = (node for node in model.graph.node if node.op_type in _OPERATIONS)
    return [node for node in nodes if node.op_type != "Add" or node.name in additions]


def rounded_tensors(model: Any) -> list[str]:
    """The activations whose ranges `quantized` asks for."""
    floats = float_tensors(model)
    nodes = [node for node in integer_nodes(model) if node.op_type not in _PASSING]
    names = [name for node in nodes for name in node.input]
    names += [name for node in nodes if node.op_type not in _FLOAT_OUTPUT for name in node.output]
    return [name for name in dict.fromkeys(names) if name in floats]


def quantized(model: Any, ranges: Ranges, left: Sequence[str] = ()) -> Any:
    """With QuantizeLinear and DequantizeLinear around all integer nodes but those `left`."""
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
            nodes_to_quantize=[node.name for node in integer_nodes(model)],
            nodes_to_exclude=list(left),
            op_types_to_quantize=list(_OPERATIONS),
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(_FLOAT_OUTPUT)},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    _leave_unrounded(quantizer.model.model.graph, frozenset(left))
    return _cleaned(quantizer.model.model, model)


def _leave_unrounded(graph: Any, left: frozenset[str]) -> None:
    """What one node in fp32 gives another goes there as it is; the library rounds it for all when it does for one.

    On ResNets the sums of the shortcuts are then rounded where they enter a convolution, and nowhere else.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for place, name in enumerate(node.input if node.name in left else ()):
            back = makers.get(name)
            rounded = makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
            if rounded is None or rounded.op_type != "QuantizeLinear":
                continue  # weights are stored as integers
            maker = makers.get(rounded.input[0])
            if maker is not None and maker.name in left:
                node.input[place] = rounded.input[0]
    for operation in ("DequantizeLinear", "QuantizeLinear"):
        taken = {name for node in graph.node for name in node.input}
        unused = [node for node in graph.node if node.op_type == operation and node.output[0] not in taken]
        for node in unused:
            graph.node.remove(node)


def _cleaned(model: Any, original: Any) -> Any:
    """Without the library's notes, and without the domains it names and does not use."""
    used = {node.domain for node in model.graph.node}
    domains = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    del model.metadata_props[:]
    del model.graph.value_info[:]
    return model
