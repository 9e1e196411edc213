"""A network in 8 bits: what is in the file, what was left out and why, and that it answers as before."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.formats.onnx.int8 import gptq, graph, layers, search
from cifarx_export.formats.onnx.int8.calibration import calibrate
from cifarx_export.formats.registry import ExportOptions, Source
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.images.preprocess import scale
from cifarx_serve.spec import InputSpec, ModelSpec


class _Small(nn.Module):
    """A residual block and a head: every kind of node that an image network has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.deep(x))
        x = nn.functional.max_pool2d(torch.relu(self.wide(x)), 4)
        return self.head(x.mean((2, 3)))


SPEC = ModelSpec(
    model="small",
    class_names=tuple("abcdefghij"),
    input=InputSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    precision="int8",
)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images than real networks get."""
    monkeypatch.setattr(search, "CALIBRATION_IMAGES", 64)
    monkeypatch.setattr(search, "_HELD_OUT", (64, 512))
    monkeypatch.setattr(search, "_SENSITIVITY", (16, 64))


def small() -> nn.Module:
    """Untrained, with a bias that lets every class have its images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _Small().eval()
    with torch.no_grad():
        logits = module(torch.from_numpy(scale(drawings(500), SPEC.input)))
        module.head.bias -= logits.mean(0)
        assert len((logits - logits.mean(0)).argmax(1).unique()) > 5
    return module


def source(module: nn.Module, images: int | None = None, lines: list[str] | None = None) -> Source:
    return Source(
        module, SPEC, ExportOptions(calibration_images=images), drawings, ([] if lines is None else lines).append, {}
    )


def drawings(count: int) -> np.ndarray:
    """Blobs of colour: unlike noise, images that differ in what a convolution sees."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def plain() -> Any:
    """`small` as an fp32 model."""
    return exported(small())


def exported(module: nn.Module) -> Any:
    """The fp32 model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (torch.rand(2, 3, 32, 32),), dynamo=True, dynamic_shapes=({0: "batch"},), input_names=["input"],
            output_names=["logits"], opset_version=18, verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model_proto


def answers(model: Any, inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input": inputs})[0])


def levels(model: Any) -> dict[str, np.ndarray]:
    """The int8 weights by name."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: array for name, array in found.items() if array.dtype == np.int8 and array.ndim >= 2}


def test_holds_integers_of_seven_bits_and_a_dynamic_batch(plain: Any) -> None:
    module = small()
    model, facts = search.quantize(plain, source(module))
    onnx.checker.check_model(model, full_check=True)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    weights = levels(model)
    assert facts["fp32 layers"] != "none" or len(weights) == 4
    assert all(np.abs(array.astype(int)).max() <= 64 for array in weights.values())
    assert max(len(np.unique(array)) for array in weights.values()) > 32
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for batch in (1, 5):
        assert answers(model, np.zeros((batch, 3, 32, 32), np.float32)).shape == (batch, 10)


def test_says_what_was_chosen(plain: Any) -> None:
    module, lines = small(), []
    _, facts = search.quantize(plain, source(module, lines=lines))
    assert set(facts) == {"calibration", "weights", "fp32 layers", "in int8", "held-out agreement"}
    assert facts["calibration"].endswith(", 64 training images")
    assert "% of 512 " in facts["held-out agreement"]
    for method in ("minmax", "entropy", "percentile"):
        assert any(line.startswith(f"int8: {method}") and line.endswith("%") for line in lines)


def test_answers_as_the_network(plain: Any) -> None:
    module = small()
    inputs = scale(drawings(2000)[1000:], SPEC.input)  # after those that were quantized with
    model, _ = search.quantize(plain, source(module))
    expected, found = answers(plain, inputs), answers(model, inputs)
    assert (expected.argmax(1) == found.argmax(1)).mean() >= 0.97
    assert np.square(found - expected).mean() < 0.002 * np.square(expected).mean()


def test_leaves_a_planted_bad_layer_in_fp32() -> None:
    """One channel of a huge range, which the next layer scales back: its tensor has no levels left for the others."""
    module = small()
    with torch.no_grad():
        module.wide.weight[0] *= 1000
        module.wide.bias[0] *= 1000
        module.head.weight[:, 0] /= 1000
    lines: list[str] = []
    model, facts = search.quantize(exported(module), source(module, lines=lines))
    assert "node_conv2d_2" in facts["fp32 layers"].split(", ")
    assert any("how much each of" in line for line in lines)
    assert not any(name.startswith("wide") for name in levels(model))
    assert levels(model)  # others are still integers


def test_same_bytes_again(plain: Any) -> None:
    module = small()
    first, second = (search.quantize(plain, source(module))[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert os.fsencode(Path(tempfile.gettempdir(), tempfile.gettempprefix())) not in first  # by way of files


def test_leaves_the_given_model_alone(plain: Any) -> None:
    module = small()
    given_model = plain
    before = given_model.SerializeToString(deterministic=True)
    search.quantize(given_model, source(module))
    assert given_model.SerializeToString(deterministic=True) == before


def test_through_the_format(tmp_path: Path) -> None:
    artifact = convert_to_onnx(source(small()))
    described = artifact.describe(SPEC)
    artifact.save(tmp_path / "a.onnx", described)
    assert described.exporter is not None
    assert "calibration" in described.exporter
    assert levels(onnx.load(tmp_path / "a.onnx"))


@pytest.mark.parametrize("count", [0, -3])
def test_refuses_no_images(plain: Any, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} calibration images"):
        search.quantize(plain, source(small(), count))


def test_refuses_more_images_than_leave_some_to_compare_on(plain: Any) -> None:
    few = source(small(), 20)._replace(training_images=lambda count: drawings(min(count, 20)))
    with pytest.raises(UsageError, match="20 calibration images of 20"):
        search.quantize(plain, few)


def test_half_of_few_images_calibrate(plain: Any) -> None:
    few = source(small())._replace(training_images=lambda count: drawings(min(count, 20)))
    _, facts = search.quantize(plain, few)
    assert facts["calibration"].endswith(", 10 training images")


def test_refuses_one_image(plain: Any) -> None:
    one = source(small())._replace(training_images=lambda _: drawings(1))
    with pytest.raises(DataError, match="1 training images"):
        search.quantize(plain, one)


def test_refuses_a_network_above_the_limit_of_a_file(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_PROTOBUF_LIMIT", 1000)
    with pytest.raises(UsageError, match="GB"):
        search.quantize(plain, source(small()))


def test_another_attempt_does_nothing_twice_and_finds_what_it_would_alone(plain: Any) -> None:
    lines: list[str] = []
    first = source(small(), lines=lines)
    search.quantize(plain, first)
    assert any("calibrating" in line for line in lines)
    lines.clear()
    again = search.quantize(plain, first._replace(attempt=3))
    assert not any("calibrating" in line or "rounding" in line or "minmax 9" in line for line in lines)
    alone = search.quantize(plain, source(small())._replace(attempt=3))
    assert again[1] == alone[1]
    assert again[0].SerializeToString(deterministic=True) == alone[0].SerializeToString(deterministic=True)


def test_the_next_attempt_asks_for_more_than_the_last_one_reached(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    found = search._Search.run

    def run(search: Any, target: float) -> Any:
        asked.append(target)
        return found(search, target)

    monkeypatch.setattr(search._Search, "run", run)
    first = source(small())
    _, facts = search.quantize(plain, first)
    reached = float(facts["held-out agreement"].partition("%")[0]) / 100
    search.quantize(plain, first._replace(attempt=1))
    assert asked[0] == search.TARGETS[0]
    assert asked[1] == search.TARGETS[-1] or asked[1] > max(asked[0], reached - 1e-4)


def test_no_image_is_both_calibrated_and_compared_on() -> None:
    numbered = source(small(), 7)._replace(
        training_images=lambda count: np.arange(count, dtype=np.uint8)[:, None, None, None]
    )
    calibration, held_out = search._split_images(numbered, 7, 40)
    assert len(calibration) == 7
    assert sorted([*calibration.ravel(), *held_out.ravel()]) == list(range(47))


def test_macs_are_those_of_the_formula(plain: Any) -> None:
    prepared = graph.prepare(plain)
    stem, deep, wide, head = 16 * 16 * 8 * 27, 16 * 16 * 8 * 72, 16 * 16 * 16 * 72, 16 * 10
    assert list(layers.macs_per_image(prepared).values()) == [stem, deep, wide, head]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(64, 96), st.integers(2, 200))
def test_rounding_for_the_inputs_beats_rounding_to_the_nearest(seed: int, outputs: int, inputs: int) -> None:
    """Of all outputs together: of one alone it may be the worse."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(outputs, inputs, generator=generator)
    rows = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    scales = weights.abs().amax(1) / gptq.LARGEST_LEVEL
    found = gptq._round(weights, scales, rows.T @ rows)
    nearest = (weights / scales[:, None]).round()
    assert torch.equal(found, found.round())
    assert found.abs().max() <= gptq.LARGEST_LEVEL

    def error(integers: torch.Tensor) -> float:
        return float(((integers * scales[:, None] - weights) @ rows.T).square().sum())

    assert error(found) <= 1.1 * error(nearest)


class _Attention(nn.Module):
    """A sum after a linear layer, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.linear(self.norm(tokens))
        head: torch.Tensor = self.head(tokens.mean(1))
        return head


def test_sums_of_a_transformer_stay_in_fp32() -> None:
    torch.manual_seed(0)
    prepared = graph.prepare(exported(_Attention().eval()))
    additions = [node for node in prepared.graph.node if node.op_type == "Add"]
    assert additions
    chosen = {node.op_type for node in graph.integer_nodes(prepared)}
    assert "Add" not in chosen
    assert "MatMul" in chosen or "Gemm" in chosen
    assert not [layer for layer in layers.find_layers(prepared) if layer.name == "additions"]


class _Blocks(nn.Module):
    """Two shortcuts, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 10, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.first(x))
        x = torch.relu(x + self.first(x))
        return self.second(x).mean((2, 3))


def test_a_shortcut_between_sums_in_fp32_is_not_rounded() -> None:
    """The first sum is rounded where a convolution takes it, and reaches the second as it is."""
    torch.manual_seed(0)
    prepared = graph.prepare(exported(_Blocks().eval()))
    [sums] = [layer for layer in layers.find_layers(prepared) if layer.name == "additions"]
    ranges = calibrate(prepared, graph.rounded_tensors(prepared), scale(drawings(8), SPEC.input))["minmax"]
    model = graph.quantized(prepared, ranges, sums.nodes)
    onnx.checker.check_model(model, full_check=True)
    makers = {name: node for node in model.graph.node for name in node.output}
    first, second = [node for node in model.graph.node if node.op_type == "Add"]
    assert [makers[name].op_type for name in first.input].count("DequantizeLinear") == 2
    assert sorted(makers[name].op_type for name in second.input) == ["DequantizeLinear", "Relu"]
    takers = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(makers[node.input[0]].op_type == "DequantizeLinear" for node in takers)
    taken = {name for node in model.graph.node for name in node.input} | {"logits"}
    assert all(taken.intersection(node.output) for node in model.graph.node)
