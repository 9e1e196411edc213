"""The layers that can be quantized, and their cost."""

import torch

from cifarx_export.formats.onnx.constant_folding import fold_constants
from cifarx_export.formats.onnx.int8 import graph, layers
from tests.support.int8_networks import AttentionNetwork, export_fp32, residual_network


def test_macs_match_the_formula() -> None:
    prepared = fold_constants(export_fp32(residual_network()))
    stem, deep, wide, head = 16 * 16 * 8 * 27, 16 * 16 * 8 * 72, 16 * 16 * 16 * 72, 16 * 10
    assert list(layers.macs_per_image(prepared).values()) == [stem, deep, wide, head]


def test_additions_of_a_transformer_stay_in_fp32() -> None:
    torch.manual_seed(0)
    prepared = fold_constants(export_fp32(AttentionNetwork().eval()))
    additions = [node for node in prepared.graph.node if node.op_type == "Add"]
    assert additions
    operators = {node.op_type for node in graph.nodes_to_quantize(prepared)}
    assert "Add" not in operators
    assert "MatMul" in operators or "Gemm" in operators
    assert not [layer for layer in layers.find_layers(prepared) if layer.name == "additions"]
