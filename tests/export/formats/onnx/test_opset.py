"""Conversion to older opsets: the same outputs in ONNX Runtime, or a refusal that names the operator."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, parser
from torch import Tensor, nn
from torch.nn import functional

from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.formats.onnx.opset import convert_to_opset, unsupported_type_error
from cifarx_export.formats.registry import ConversionSource, ExportOptions
from cifarx_serve.errors import UsageError
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec
from tests.support.int8_networks import color_blobs, export_fp32, residual_network

OLD_OPSETS = range(11, 18)


class ManyOperators(nn.Module):
    """A network with operators whose signature or meaning has changed since opset 11."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 7, 3)
        self.lstm = nn.LSTM(7, 7, batch_first=True)
        self.head = nn.Linear(7, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(images))  # not folded, because it comes first
        x = functional.pad(functional.interpolate(x, scale_factor=0.5, mode="bilinear"), (1, 2, 0, 1), value=0.5)
        x = functional.pad(functional.interpolate(x, (19, 21), mode="nearest"), (1, 1, 1, 1), mode="reflect")
        x = functional.hardswish(self.conv(x))
        parts = x.chunk(3, dim=1)  # 3, 3 and 1 channels
        x = torch.cat([parts[0].softmax(2), functional.hardsigmoid(parts[1]), parts[2].clamp(-1, 1)], dim=1)
        x = functional.avg_pool2d(functional.max_pool2d(x, 2), 2) / x.sum((1, 2, 3), keepdim=True)
        x = x - x.amax((2, 3), keepdim=True) + functional.log_softmax(x, 1)
        x = self.lstm(x.flatten(2).transpose(1, 2))[0][:, -1]
        logits: Tensor = self.head(x + x.norm(dim=1, keepdim=True))
        return logits


def run(model: ModelProto, inputs: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])


def converted(model: ModelProto, opset: int) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    convert_to_opset(copy, opset)
    onnx.checker.check_model(copy, full_check=True)
    assert [(entry.domain, entry.version) for entry in copy.opset_import] == [("", opset)]
    return copy


@pytest.fixture(scope="module")
def many_operators() -> ModelProto:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return export_fp32(ManyOperators().eval())


@pytest.mark.parametrize("opset", OLD_OPSETS)
def test_outputs_are_the_same_in_every_opset(many_operators: ModelProto, opset: int) -> None:
    inputs = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    np.testing.assert_allclose(run(converted(many_operators, opset), inputs), run(many_operators, inputs), atol=1e-6)


def test_the_test_covers_every_kind_of_conversion(many_operators: ModelProto) -> None:
    operators = {node.op_type for node in many_operators.graph.node}
    assert operators >= {
        "BatchNormalization", "Clip", "HardSwish", "LSTM", "LogSoftmax", "Pad", "ReduceMax", "ReduceSum", "Resize",
        "Softmax", "Split",
    }  # fmt: skip


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 6), (12, 7), (14, 7), (15, 8), (17, 8)])
def test_the_ir_version_is_the_oldest_that_the_opset_allows(opset: int, ir_version: int) -> None:
    assert converted(graph("output = Relu (input)"), opset).ir_version == ir_version


def graph(nodes: str, constants: str = "", shape: str = "batch, 6", output: str = "") -> ModelProto:
    """Return a model of opset 18 from `input`, float, to `output`."""
    result = output or f"float[{shape}] output"
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> test (float[{shape}] input) => ({result})'
        f"<{constants}> {{ {nodes} }}"
    )
    return onnx.shape_inference.infer_shapes(model)


EQUIVALENT = {
    "axes as an attribute": graph(
        "wide = Unsqueeze (input, axis) sums = ReduceSum <keepdims = 0> (wide, axis) output = Relu (sums)",
        "int64[1] axis = {1}",
    ),
    "a part of the shape": graph(
        "size = Shape <start = 1, end = 2> (input) flat = Expand (zero, size) output = Add (input, flat)",
        "float zero = {2}",
    ),
    "the end of the shape": graph(
        "size = Shape <start = -1> (input) flat = Expand (zero, size) output = Add (input, flat)", "float zero = {2}"
    ),
    "unequal parts": graph(
        "a, b, c, d = Split <axis = 1, num_outputs = 4> (input) output = Concat <axis = 1> (d, c, b, a)",
        shape="batch, 7",
    ),
    "equal parts": graph("a, b = Split <axis = 1, num_outputs = 2> (input) output = Concat <axis = 1> (b, a)"),
    "padding of one axis": graph(
        "output = Pad (input, pads, value, axis)",
        "int64[2] pads = {1, 2}, float value = {7}, int64[1] axis = {1}",
        output="float[batch, 9] output",
    ),
    "a softmax over the first of two axes": graph("output = Softmax <axis = 0> (input)"),
    "a softmax over a middle axis": graph("output = Softmax <axis = -2> (input)", shape="batch, 4, 3"),
    "a reshape without zeros": graph("output = Reshape <allowzero = 1> (input, shape)", "int64[2] shape = {-1, 6}"),
    "numbers as constants": graph(
        "numbers = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]> () output = Add (input, numbers)"
    ),
    "a node in a branch": graph(
        "sums = ReduceSum <keepdims = 0> (input) positive = Greater (sums, zero) "
        "output = If (positive) <then_branch = a () => (float[batch, 6] yes) { yes = HardSwish (input) }, "
        "else_branch = b () => (float[batch, 6] no) { no = Softmax <axis = 0> (input) }>",
        "float zero = {0}",
    ),
}


@pytest.mark.parametrize("name", EQUIVALENT)
@pytest.mark.parametrize("opset", [11, 12, 13, 14])
def test_operators_are_expressed_by_older_ones(name: str, opset: int) -> None:
    model = EQUIVALENT[name]
    shape = [axis.dim_value or 3 for axis in model.graph.input[0].type.tensor_type.shape.dim]
    inputs = np.random.default_rng(0).standard_normal(shape, np.float32)
    for sign in (1, -1):
        np.testing.assert_allclose(run(converted(model, opset), sign * inputs), run(model, sign * inputs), rtol=1e-6)


REFUSED: list[tuple[ModelProto, int, str, int]] = [
    (graph("output = LayerNormalization (input, scale)", "float[6] scale = {1, 1, 1, 1, 1, 1}"), 16,
     "LayerNormalization", 17),
    (graph('output = Einsum <equation = "bi,bi->bi"> (input, input)'), 11, "Einsum", 12),
    (graph("output = Mish (input)"), 17, "Mish", 18),
    (graph("rows = Einsum <equation = \"bi,bi->bi\"> (input, input) output = Mish (rows)"), 11, "Mish", 18),
    (graph("output = Reshape <allowzero = 1> (input, shape)", "int64[2] shape = {0, 6}"), 13,
     "Reshape with allowzero", 14),
    (graph("size = Shape <start = 1, end = 2> (input) axes = Sub (size, size) "
           "sums = ReduceMax (input, axes) output = Add (input, sums)"), 17, "ReduceMax with a computed input", 18),
]  # fmt: skip


@pytest.mark.parametrize(("model", "opset", "operator", "needed"), REFUSED, ids=[entry[2] for entry in REFUSED])
def test_an_operator_without_an_equivalent_is_named(model: ModelProto, opset: int, operator: str, needed: int) -> None:
    with pytest.raises(UsageError) as raised:
        converted(model, opset)
    assert str(raised.value) == f"{operator} needs opset {needed}: use --opset {needed} or newer"
    if needed < 18:
        converted(model, needed)


def test_an_operator_that_did_not_take_a_type_is_named() -> None:
    """Max took integers from opset 12 on."""
    model = graph("size = Shape (input) larger = Max (size, size) output = Expand (input, larger)")
    convert_to_opset(model, 11)
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)) as raised:
        onnx.checker.check_model(model, full_check=True)
    assert str(unsupported_type_error(raised.value, 11)) == "Max of this type needs opset 12: use --opset 12 or newer"
    assert unsupported_type_error(ValueError("something else"), 11) is None


# Through the converter.

SPEC = ModelSpec(model="small", class_names=tuple("abcdefghij"), input=InputSpec(height=32, width=32))


def source(module: nn.Module, opset: int, **spec: Any) -> ConversionSource:
    fields = {"model": SPEC.model, "class_names": SPEC.class_names, "input": SPEC.input, **spec}
    return ConversionSource(lambda: module, ModelSpec(**fields), ExportOptions(opset=opset), color_blobs, silent)


@pytest.mark.parametrize(("opset", "precision"), [(11, "fp32"), (12, "fp16"), (13, "int8"), (17, "fp32")])
def test_files_of_every_precision_have_the_requested_opset(opset: int, precision: Any, tmp_path: Path) -> None:
    converting = source(residual_network(), opset, precision=precision)
    artifact = next(convert_to_onnx(converting))
    spec = artifact.complete_spec(converting.spec)
    artifact.save(tmp_path / "a.onnx", spec)
    model = onnx.load(tmp_path / "a.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert spec.minimum_onnxruntime == {11: "1.2", 12: "1.3", 13: "1.6", 17: "1.12"}[opset]
    assert (spec.exporter or {})["opset"] == str(opset)
    pixels = color_blobs(8).transpose(0, 3, 1, 2).astype(np.float32) / 255
    with torch.no_grad():
        expected = residual_network()(torch.from_numpy(pixels)).numpy()
    tolerance = {"fp32": 1e-5, "fp16": 2e-2, "int8": 0.5}[precision]
    np.testing.assert_allclose(run(model, pixels), expected, atol=tolerance * np.abs(expected).max())


def test_a_network_with_layer_normalization_is_refused_by_its_name() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.LayerNorm(10)).eval()
    with pytest.raises(UsageError, match=r"^LayerNormalization needs opset 17: use --opset 17 or newer$"):
        next(convert_to_onnx(source(module, 13)))
