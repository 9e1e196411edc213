"""Whole ONNX models as networks of PyTorch."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from cifarx_export.onnx_network.network import OPERATORS, OnnxNetwork, build_network
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.errors import UsageError
from tests.support.int8_networks import export_fp32
from tests.support.onnx_graphs import SHAPE, graph_of, random_weights

MODELS = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
"""Networks of other programs with all weights left out, which the package of ONNX contains."""

SIDE = 32
"""Height and width of the images, which `export_fp32` exports with."""

SMALL = ("squeezenet", "shufflenet")
LARGE = ("densenet121", "inception_v1", "inception_v2", "resnet50")


def with_random_weights(name: str) -> ModelProto:
    """Return a network of the package of ONNX with random weights, whose outputs depend on its images."""
    model = onnx.load(MODELS / f"light_{name}.onnx")
    random, graph = np.random.default_rng(0), model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(copy.deepcopy(node))
            continue
        shape = constants[node.input[0]]
        spread = np.sqrt(2 / max(1, int(np.prod(shape[1:]))))
        values = np.abs(random.normal(0, spread, shape)) if len(shape) == 1 else random.normal(0, spread, shape)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    images = copy.deepcopy(next(info for info in graph.input if info.name.endswith("data_0")))
    del graph.node[:], graph.input[:]
    graph.node.extend(kept)
    graph.input.append(images)
    model.ir_version = 8
    return model


def assert_same(model: ModelProto, shape: tuple[int, ...], name: str = "input") -> None:
    images = np.random.default_rng(1).random((1, *shape), np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {name: images})[0]
    with torch.no_grad():
        found = OnnxNetwork(model, shape).eval()(torch.from_numpy(images)).numpy()
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_networks_of_other_programs(name: str) -> None:
    model = with_random_weights(name)
    image = model.graph.input[0]
    shape = tuple(dim.dim_value for dim in image.type.tensor_type.shape.dim[1:])
    assert_same(model, shape, image.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "convnext_tiny", "swin_t", "vit_b_16"])
def test_networks_of_torchvision(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"image_size": SIDE} if name == "vit_b_16" else {}
        module = torchvision.models.get_model(name, num_classes=10, **options).eval()
        head = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.normal_(head.weight, std=0.1)  # that of ViT starts at zero
    assert_same(export_fp32(module), (3, SIDE, SIDE))


def test_a_network_of_this_package_has_its_weights_as_parameters(good_onnx: Path) -> None:
    spec = read_spec(good_onnx)
    network = build_network(onnx.load(good_onnx), good_onnx.name, spec)
    assert not network.training
    assert {tuple(weight.shape) for weight in network.parameters()} >= {(32, 3, 5, 5), (64, 1024), (10, 64)}
    images = torch.rand(3, *spec.input.shape)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        before = network(images)
        for weight in copied.parameters():
            weight.zero_()
        assert torch.equal(network(images), before)
        assert not torch.equal(copied(images), before)


def test_batch_normalization_is_folded_into_the_convolution() -> None:
    statistics = {name: np.abs(random_weights(6)) + 1 for name in ("scale", "bias", "mean", "variance")}
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["convolved"]),
        helper.make_node("BatchNormalization", ["convolved", *statistics], ["output"]),
    ]
    model = graph_of(nodes, {"weight": random_weights(6, 4, 3, 3), **statistics})
    assert_same(model, SHAPE)
    network = OnnxNetwork(model, SHAPE)
    program = torch.export.export(network, (torch.rand(2, *SHAPE),))
    assert {node.target for node in program.graph.nodes if node.op == "call_function"} == {
        torch.ops.aten.conv2d.default
    }


def test_products_with_weights_are_linear_layers() -> None:
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "second", "bias"], ["output"]),
    ]
    weights = {"first": random_weights(144, 5), "second": random_weights(5, 3), "bias": random_weights(1, 3)}
    model = graph_of(nodes, weights)
    assert_same(model, SHAPE)
    program = torch.export.export(OnnxNetwork(model, SHAPE), (torch.rand(2, *SHAPE),))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.aten.linear.default) == 2
    assert torch.ops.aten.matmul.default not in targets


def test_weights_that_two_layers_share_are_kept_once() -> None:
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["once"]),
        helper.make_node("Conv", ["once", "weight"], ["output"]),
    ]
    model = graph_of(nodes, {"weight": random_weights(4, 4, 1, 1)})
    assert_same(model, SHAPE)
    assert len(list(OnnxNetwork(model, SHAPE).parameters())) == 1


def test_images_of_open_size_and_constants_as_nodes() -> None:
    weight = numpy_helper.from_array(random_weights(2, 4, 3, 3), "weight")
    nodes = [
        helper.make_node("Constant", [], ["weight"], value=weight),
        helper.make_node("Conv", ["input", "weight"], ["maps"]),
        helper.make_node("Shape", ["maps"], ["shape"], start=2),
        helper.make_node("ReduceProd", ["shape"], ["count"]),
        helper.make_node("Concat", ["rows", "count"], ["target"], axis=0),
        helper.make_node("Reshape", ["maps", "target"], ["output"]),
    ]
    model = graph_of(nodes, {"rows": np.array([0, 2])})
    for axis in model.graph.input[0].type.tensor_type.shape.dim[1:]:
        axis.dim_param = "any"
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert_same(model, SHAPE)


def test_functions_are_inlined() -> None:
    domain = "of.another.program"
    body = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["r"], ["y"])]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function(domain, "NegativeRelu", ["x"], ["y"], body, opsets)
    model = graph_of([helper.make_node("NegativeRelu", ["input"], ["output"], domain=domain)])
    model.opset_import.append(helper.make_opsetid(domain, 1))
    model.functions.append(function)
    assert_same(model, SHAPE)


UNSUPPORTED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "an operator": ([helper.make_node("Hardmax", ["input"], ["output"])], {}, "uses Hardmax"),
    "an attribute": (
        [helper.make_node("Pad", ["input", "pads"], ["output"], mode="reflect")],
        {"pads": np.array([0, 1, 0, 0, 0, 0, 0, 0])},
        "uses Pad of channels with the mode reflect",
    ),
    "a shape from values": (
        [
            helper.make_node("ReduceMax", ["input"], ["largest"], keepdims=0),
            helper.make_node("Cast", ["largest"], ["count"], to=TensorProto.INT64),
            helper.make_node("Unsqueeze", ["count", "zero"], ["repeats"]),
            helper.make_node("Expand", ["row", "repeats"], ["output"]),
        ],
        {"zero": np.array([0]), "row": np.zeros(1, np.float32)},
        "uses a shape that depends on the values of the images",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_is_not_supported_is_refused_in_one_line(kind: str, good_onnx: Path) -> None:
    nodes, constants, words = UNSUPPORTED[kind]
    model = graph_of(nodes, constants)
    spec = read_spec(good_onnx)
    image = model.graph.input[0].type.tensor_type.shape
    for axis, size in zip(image.dim[1:], spec.input.shape, strict=True):
        axis.dim_value = size
    with pytest.raises(
        UsageError, match=f"^theirs.onnx {words}, which cifarx cannot turn into .* made from ONNX"
    ) as caught:
        build_network(model, "theirs.onnx", spec)
    assert "\n" not in str(caught.value)


def test_every_operator_is_one_of_onnx() -> None:
    assert [name for name in OPERATORS if name != "Linear" and not onnx.defs.has(name)] == []


def test_it_is_a_module_like_any_other() -> None:
    model = graph_of([helper.make_node("Relu", ["input"], ["output"])])
    network = nn.Sequential(OnnxNetwork(model, SHAPE), nn.Flatten())
    assert network(torch.zeros(2, *SHAPE)).shape == (2, 144)
