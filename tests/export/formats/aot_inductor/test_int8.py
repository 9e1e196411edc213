"""int8 packages of AOTInductor: which operators run in int8, that the compiled code rounds as the evaluation does, and
that faults are caught."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from cifarx_export.formats.aot_inductor import converter
from cifarx_export.formats.aot_inductor.converter import AotInductorArtifact, convert_to_aot_inductor
from cifarx_export.formats.int8 import search
from cifarx_export.formats.int8.search import MixedPrecision
from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource
from cifarx_export.parity.compare import EVAL_BATCH_SIZE, Reference, check_parity, run_reference
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.torch.aot_inductor import AotInductorBackend, target_machine
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.progress import silent
from tests.support.int8_networks import SPEC, AttentionNetwork, color_blobs, residual_network, vision_transformer
from tests.support.local_paths import assert_no_local_paths
from tests.support.module_backend import ModuleBackend

if target_machine() is None:
    pytest.skip("AOTInductor packages are for Linux on x86-64 with AVX2", allow_module_level=True)

from cifarx_export.formats.aot_inductor.graph import prepare_graph
from cifarx_export.formats.aot_inductor.int8 import QuantizationSearch
from cifarx_export.formats.aot_inductor.operators import (
    CONVOLUTION,
    CONVOLUTION_ADD,
    LINEAR,
    MAX_POOL,
    write_in_place,
)
from cifarx_export.formats.aot_inductor.quantized_graph import quantization_of

pytestmark = pytest.mark.timeout(900)  # compiling takes minutes on a busy machine

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
ONEDNN = {CONVOLUTION, CONVOLUTION_ADD, LINEAR, MAX_POOL}


class BranchingNetwork(nn.Module):
    """Batch normalization, a block with a convolution in both branches, a depthwise convolution, few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16))
        self.short = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2), nn.BatchNorm2d(16))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Hardswish())
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.deep(x) + self.short(x))
        x = nn.functional.max_pool2d(x + self.depthwise(x), 2)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def branching_network() -> nn.Module:
    """Return a `BranchingNetwork` with statistics that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = BranchingNetwork()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, std=0.25)  # type: ignore[arg-type]
                nn.init.uniform_(part.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return module.eval()


def inputs(count: int) -> np.ndarray:
    return normalize(color_blobs(count), SPEC.input)


def source_of(module: nn.Module) -> ConversionSource:
    return ConversionSource(lambda: module, SPEC, NO_OPTIONS, color_blobs, silent)


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_images(monkeypatch)


def use_few_images(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(search, "CALIBRATION_IMAGES", 64)
    patch.setattr(search, "_HELD_OUT_IMAGES", (128, 128))


def quantized(module: nn.Module, *fp32_layers: str) -> GraphModule:
    """Return the graph with all layers in int8 but the named ones."""
    found = QuantizationSearch(module, source_of(module))
    layers = tuple(layer for layer in found._layers if layer.name in fp32_layers)
    return found._quantize(MixedPrecision("minmax", layers))


def run(network: nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = network(torch.from_numpy(batch)).numpy()
    return logits


def operators(network: GraphModule) -> list[str]:
    """Return the operators of a graph in order, without those that only prepare weights."""
    nodes = [node for node in network.graph.nodes if node.op == "call_function" and node.all_input_nodes]
    names = [str(node.target).split(".")[1] for node in nodes]
    return [name for name in names if "pack" not in name.partition("_")[0] and "prepack" not in name]


@pytest.mark.slow
def test_a_block_with_two_branches_stays_in_int8() -> None:
    assert operators(quantized(branching_network())) == [
        "contiguous", "quantize_per_tensor",
        "qconv_pointwise",
        "qconv_pointwise", "convolution_add",
        "qconv_pointwise", "dequantize_per_tensor", "add", "max_pool2d", "mean", "quantize_per_tensor",
        "qlinear_pointwise",
    ]  # fmt: skip


def test_batch_normalization_and_padding_are_folded() -> None:
    module, batch = branching_network(), inputs(3)
    network = prepare_graph(module, torch.from_numpy(batch))
    targets = {str(node.target) for node in network.graph.nodes}
    assert not any("batch_norm" in target or "conv2d.padding" in target for target in targets)
    np.testing.assert_allclose(run(network, batch), run(module, batch), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [branching_network(), residual_network(), AttentionNetwork().eval(), vision_transformer()]
)
def test_the_int8_network_is_close_to_the_network(module: nn.Module) -> None:
    batch = inputs(64)
    logits, expected = run(quantized(module), batch), run(module, batch)
    assert 0 < np.square(logits - expected).mean() < 0.01 * np.square(expected - expected.mean(0)).mean()


@pytest.mark.slow
def test_the_share_in_int8_of_a_transformer_is_stated() -> None:
    module = vision_transformer()
    first = next(QuantizationSearch(module, source_of(module)).candidates())
    assert re.fullmatch(r"\d+% of the multiplications", first.facts["in int8"])
    assert first.gain.passed


@pytest.mark.slow
def test_layers_in_fp32_stay_as_they_are() -> None:
    module = residual_network()
    names = [node.name for node in prepare_graph(module, torch.from_numpy(inputs(2))).graph.nodes]
    network = quantized(module, *names, "operators without weights")
    assert not {node.target for node in network.graph.nodes} & ONEDNN
    np.testing.assert_allclose(run(network, inputs(8)), run(module, inputs(8)), atol=1e-6)


@pytest.mark.slow
def test_a_choice_with_layers_in_fp32_states_them() -> None:
    module = residual_network()
    network = quantized(module, "conv2d", "operators without weights")
    targets = [node.target for node in network.graph.nodes]
    assert targets.count(torch.ops.aten.conv2d.default) == 1
    assert CONVOLUTION_ADD not in targets
    first = next(QuantizationSearch(module, source_of(module)).candidates())
    assert first.facts["weights"] == "7 bits, per channel, rounded by GPTQ"
    assert first.gain.passed


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [(-1.0, 1.55, 0.01, 100), (0.0, 2.55, 0.01, 0), (1.0, 2.55, 0.01, 0), (-2.55, -1.0, 0.01, 255), (0, 0, 2**-20, 0)],
)
def test_zero_is_represented_exactly(low: float, high: float, scale: float, zero_point: int) -> None:
    assert quantization_of(low, high) == (pytest.approx(scale), zero_point)


def addition(graph: Graph, accumulator: Node, x: Node) -> Node:
    return graph.call_function(CONVOLUTION_ADD, (x, 0.1, 0, x, x, x, accumulator))


def test_what_is_read_again_is_copied_before_it_is_written_to() -> None:
    def copies(read_later: bool, target: object = CONVOLUTION, own_input: bool = False) -> int:
        graph = Graph()
        x = graph.placeholder("x")
        accumulator = graph.call_function(target, (x,))  # type: ignore[arg-type]
        accumulator.meta["val"] = None
        added = addition(graph, accumulator, accumulator if own_input else x)
        graph.output((added, graph.call_function(MAX_POOL, (accumulator,))) if read_later else added)
        write_in_place(graph)
        assert CONVOLUTION_ADD not in {node.target for node in graph.nodes}
        return sum(node.target is torch.ops.aten.clone.default for node in graph.nodes)

    assert copies(read_later=False) == 0
    assert copies(read_later=True) == 1
    assert copies(read_later=False, own_input=True) == 1
    assert copies(read_later=False, target=torch.ops.aten.reshape.default) == 1  # may be a view


# The compiled package.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[AotInductorArtifact, Path]:
    """Compile the branching network."""
    try:
        converter._require_compiler()
    except UsageError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        artifact = next(convert_to_aot_inductor(source_of(branching_network())))
    path = tmp_path_factory.mktemp("int8") / "a-name-to-search-for.aoti.pt2"
    artifact.save(path, artifact.complete_spec(SPEC))
    return artifact, path


@pytest.mark.slow
def test_the_package_rounds_as_the_evaluation_does(compiled: tuple[AotInductorArtifact, Path]) -> None:
    module = branching_network()
    network = next(QuantizationSearch(module, source_of(module)).candidates()).network
    with AotInductorBackend(compiled[1], Device("cpu")) as backend:
        for size in (1, 2, 3, 64, 130):
            batch = inputs(size)
            np.testing.assert_allclose(backend.run(batch), run(network, batch), atol=1e-5)


@pytest.mark.slow
def test_the_package_runs_int8_code_and_says_what_it_is(compiled: tuple[AotInductorArtifact, Path]) -> None:
    artifact, path = compiled
    content = path.read_bytes()
    for name in (b"qconv_pointwise", b"qconv2d_pointwise_binary", b"qlinear_pointwise"):
        assert name in content
    assert b"a-name-to-search-for" not in content
    assert_no_local_paths(content)
    assert [check.name for check in artifact.checks] == ["int8 gain"]
    exporter = AotInductorBackend.read_spec(path).exporter or {}
    assert {"calibration", "weights", "fp32 layers", "in int8", "held-out agreement", "cpu", "torch"} <= set(exporter)


# Faults that a quantizer could make, in the graph that is compiled.


def nodes_of(network: GraphModule, target: object) -> list[Node]:
    return [node for node in network.graph.nodes if node.target is target]


def with_argument(target: object, position: int, change: Callable[[object], object]) -> Callable[[GraphModule], None]:
    """Return a fault that changes an argument of every node with this target whose result is in int8."""

    def plant(network: GraphModule) -> None:
        for node in nodes_of(network, target):
            if torch.uint8 in node.args:
                node.update_arg(position, change(node.args[position]))  # type: ignore[arg-type]

    return plant


def with_constant(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[GraphModule], None]:
    """Return a fault that changes the constants of every layer."""

    def plant(network: GraphModule) -> None:
        for name, value in list(network.named_buffers()):
            if name.endswith(suffix):
                layer, _, attribute = name.rpartition(".")
                setattr(network.get_submodule(layer), attribute, change(value))

    return plant


def of_another_layer(network: GraphModule) -> None:
    network.register_buffer("conv2d_1_scales", network.get_buffer("conv2d_scales"))


def without_the_block(network: GraphModule) -> None:
    [node] = nodes_of(network, CONVOLUTION_ADD)
    node.replace_all_uses_with(node.args[6])  # type: ignore[arg-type]


FAULTS: dict[str, Callable[[GraphModule], None]] = {
    "scale of the result": with_argument(CONVOLUTION, 11, lambda scale: 2.0 * scale),  # type: ignore[operator]
    "scale of the input": with_argument(CONVOLUTION, 1, lambda scale: 1.3 * scale),  # type: ignore[operator]
    "zero point": with_argument(QUANTIZE, 2, lambda point: point + 20),  # type: ignore[operator]
    "saturation": with_argument(QUANTIZE, 1, lambda scale: 0.2 * scale),  # type: ignore[operator]
    "scale of the sum": with_argument(CONVOLUTION_ADD, 15, lambda scale: 2.0 * scale),  # type: ignore[operator]
    "dropped block": without_the_block,
    "scales of another layer": of_another_layer,
    "channel order": with_constant("_levels", lambda levels: levels.flip(1)),
    "class order": with_constant("linear_levels", lambda levels: levels.roll(1, 0)),
    "stale weights": with_constant("_levels", lambda levels: levels.roll(3, 0)),
    "dropped bias": with_constant("bias", torch.zeros_like),
    "sign": with_constant("_levels", lambda levels: -levels),
    "NaN": with_constant("linear_scales", lambda scales: scales * torch.nan),
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The reference on images whose two best classes are not close, although the network is untrained."""
    module, images = residual_network(), color_blobs(1300)
    best = np.sort(run(module, normalize(images, SPEC.input)), axis=1)
    clearest = np.argsort(best[:, -2] - best[:, -1])[:1003]
    backend = ModuleBackend(module, msgspec.structs.replace(SPEC, precision="fp32"))
    return run_reference(backend, ParityData(images[clearest], None, "color blobs", "0"))


@pytest.fixture(scope="module")
def sound() -> GraphModule:
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        return quantized(residual_network())


def failures(network: GraphModule, reference: Reference) -> set[str]:
    network.recompile()
    result = check_parity(
        reference, ModuleBackend(network, SPEC), get_tolerance("int8"), batch_sizes=(EVAL_BATCH_SIZE,)
    )
    return {check.name for check in result.failures}


@pytest.mark.slow
def test_a_network_without_a_fault_passes(sound: GraphModule, reference: Reference) -> None:
    assert failures(copy.deepcopy(sound), reference) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, sound: GraphModule, reference: Reference) -> None:
    network = copy.deepcopy(sound)
    FAULTS[name](network)
    assert failures(network, reference) & {"agreement", "finite"}
