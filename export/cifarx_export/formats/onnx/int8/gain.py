"""What a quantized model has gained over the fp32 model."""

from collections.abc import Mapping

from onnx import ModelProto

from cifarx_export.formats.int8 import gain
from cifarx_export.parity.checks import Check


def int8_share(quantized: ModelProto, macs: Mapping[str, int]) -> float:
    """Return the share of the multiplications that run in int8, from 0 to 1.

    Args:
        quantized: a model with QDQ nodes.
        macs: the multiplications of each node with weights in the fp32 model, by the name of the node.
    """
    dequantized = {node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    in_int8 = sum(macs.get(node.name, 0) for node in quantized.graph.node if dequantized.issuperset(node.input[:2]))
    return in_int8 / max(1, sum(macs.values()))


def check_gain(quantized: ModelProto, original: ModelProto, macs: Mapping[str, int]) -> Check:
    """Check that a quantized model runs a part of its multiplications in int8, or is smaller than the original.

    Args:
        quantized: a model with QDQ nodes.
        original: the fp32 model.
        macs: see `int8_share`.
    """
    return gain.check_gain(int8_share(quantized, macs), _weight_bytes(original), _weight_bytes(quantized))


def _weight_bytes(model: ModelProto) -> int:
    return sum(tensor.ByteSize() for tensor in model.graph.initializer)
