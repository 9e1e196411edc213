"""Where QDQ nodes are inserted, and where they are not."""

import onnx
import torch

from cifarx_export.formats.int8.calibration import calibrate
from cifarx_export.formats.onnx.constant_folding import fold_constants
from cifarx_export.formats.onnx.int8 import graph, layers
from cifarx_export.formats.onnx.int8.inference import iterate_activations
from cifarx_serve.images.preprocess import normalize
from tests.support.int8_networks import SPEC, TwoBlockNetwork, color_blobs, export_fp32


def test_no_qdq_between_residual_additions_in_fp32() -> None:
    """The first sum is quantized where a convolution reads it, and reaches the second addition in fp32."""
    torch.manual_seed(0)
    prepared = fold_constants(export_fp32(TwoBlockNetwork().eval()))
    [additions] = [layer for layer in layers.find_layers(prepared) if layer.name == "additions"]
    names = graph.tensors_to_calibrate(prepared)
    ranges = calibrate(iterate_activations(prepared, names, normalize(color_blobs(8), SPEC.input)))["minmax"]
    model = graph.insert_qdq(prepared, ranges, additions.nodes)
    onnx.checker.check_model(model, full_check=True)
    producers = {name: node for node in model.graph.node for name in node.output}
    first, second = [node for node in model.graph.node if node.op_type == "Add"]
    assert [producers[name].op_type for name in first.input].count("DequantizeLinear") == 2
    assert sorted(producers[name].op_type for name in second.input) == ["DequantizeLinear", "Relu"]
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(producers[node.input[0]].op_type == "DequantizeLinear" for node in convolutions)
    read = {name for node in model.graph.node for name in node.input} | {"logits"}
    assert all(read.intersection(node.output) for node in model.graph.node)
