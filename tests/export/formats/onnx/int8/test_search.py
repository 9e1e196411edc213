"""Int8 models: their content, which layers stay in fp32 and why, and which candidates are offered."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from cifarx_export.formats.int8 import search
from cifarx_export.formats.int8.search import AGREEMENT_TARGETS, MixedPrecision, Score, _Trial
from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.formats.onnx.int8 import search as onnx_search
from cifarx_export.formats.onnx.int8.search import QuantizationSearch
from cifarx_export.formats.registry import ConversionSource, ExportOptions
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.images.preprocess import normalize
from tests.support.int8_networks import SPEC, color_blobs, export_fp32, residual_network, run_model


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CALIBRATION_IMAGES", 64)
    monkeypatch.setattr(search, "_HELD_OUT_IMAGES", (64, 512))
    monkeypatch.setattr(search, "_SENSITIVITY_IMAGES", (16, 64))


def source(
    images: int | None = None, lines: list[str] | None = None, module: nn.Module | None = None
) -> ConversionSource:
    """Return a source with `images` calibration images, whose progress is added to `lines`."""
    options = ExportOptions(calibration_images=images)
    progress = ([] if lines is None else lines).append
    return ConversionSource(lambda: module or residual_network(), SPEC, options, color_blobs, progress)


def at_most(limit: int) -> Callable[[int], np.ndarray]:
    """Return a loader of a training split with this number of images."""
    return lambda count: color_blobs(min(count, limit))


@pytest.fixture(scope="module")
def fp32_model() -> ModelProto:
    return export_fp32(residual_network())


def quantize(model: ModelProto, source: ConversionSource) -> tuple[ModelProto, dict[str, str]]:
    """Return the first candidate."""
    return next(QuantizationSearch(model, source).candidates())


def int8_weights(model: ModelProto) -> dict[str, np.ndarray]:
    """Return the int8 weights by name."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: array for name, array in arrays.items() if array.dtype == np.int8 and array.ndim >= 2}


def test_weights_have_seven_bits_and_the_batch_is_dynamic(fp32_model: ModelProto) -> None:
    model, facts = quantize(fp32_model, source())
    onnx.checker.check_model(model, full_check=True)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    weights = int8_weights(model)
    assert facts["fp32 layers"] != "none" or len(weights) == 4
    assert all(np.abs(array.astype(int)).max() <= 64 for array in weights.values())
    assert max(len(np.unique(array)) for array in weights.values()) > 32
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for batch in (1, 5):
        assert run_model(model, np.zeros((batch, 3, 32, 32), np.float32)).shape == (batch, 10)


def test_facts_and_progress_describe_the_choice(fp32_model: ModelProto) -> None:
    lines: list[str] = []
    _, facts = quantize(fp32_model, source(lines=lines))
    assert set(facts) == {"calibration", "weights", "fp32 layers", "in int8", "held-out agreement"}
    assert facts["calibration"].endswith(", 64 training images")
    assert "% of 512 " in facts["held-out agreement"]
    for method in ("minmax", "entropy", "percentile"):
        assert any(line.startswith(f"int8: {method}") and line.endswith("%") for line in lines)


def test_outputs_are_close_to_fp32(fp32_model: ModelProto) -> None:
    inputs = normalize(color_blobs(2000)[1000:], SPEC.input)  # not used for quantization
    model, _ = quantize(fp32_model, source())
    expected, logits = run_model(fp32_model, inputs), run_model(model, inputs)
    assert (expected.argmax(1) == logits.argmax(1)).mean() >= 0.97
    assert np.square(logits - expected).mean() < 0.002 * np.square(expected).mean()


def test_a_layer_that_cannot_be_quantized_stays_in_fp32() -> None:
    """One channel has a huge range, which the next layer scales back, so few levels are left for the others."""
    module = residual_network()
    assert module.wide.bias is not None
    with torch.no_grad():
        module.wide.weight[0] *= 1000
        module.wide.bias[0] *= 1000
        module.head.weight[:, 0] /= 1000
    lines: list[str] = []
    model, facts = quantize(export_fp32(module), source(lines=lines))
    assert "node_conv2d_2" in facts["fp32 layers"].split(", ")
    assert any("measuring the sensitivity of" in line for line in lines)
    assert not any(name.startswith("wide") for name in int8_weights(model))
    assert int8_weights(model)  # others are quantized


def test_quantizing_again_gives_the_same_bytes(fp32_model: ModelProto) -> None:
    first, second = (quantize(fp32_model, source())[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert os.fsencode(Path(tempfile.gettempdir(), tempfile.gettempprefix())) not in first  # the library writes files


def test_the_fp32_model_is_not_modified(fp32_model: ModelProto) -> None:
    before = fp32_model.SerializeToString(deterministic=True)
    quantize(fp32_model, source())
    assert fp32_model.SerializeToString(deterministic=True) == before


def test_the_onnx_converter_writes_an_int8_file(tmp_path: Path) -> None:
    artifact = next(convert_to_onnx(source()))
    spec = artifact.complete_spec(SPEC)
    artifact.save(tmp_path / "a.onnx", spec)
    assert spec.exporter is not None
    assert "calibration" in spec.exporter
    assert int8_weights(onnx.load(tmp_path / "a.onnx"))


@pytest.mark.parametrize("count", [0, -3])
def test_too_few_calibration_images_are_refused(fp32_model: ModelProto, count: int) -> None:
    with pytest.raises(
        UsageError, match=f"^{count} calibration images are too few: give 1 or more; the default is 64$"
    ):
        quantize(fp32_model, source(count))


def test_calibration_images_must_leave_some_to_compare_on(fp32_model: ModelProto) -> None:
    few = replace(source(20), load_training_images=at_most(20))
    message = "^20 calibration images leave none of the 20 training images to compare on: give fewer$"
    with pytest.raises(UsageError, match=message):
        quantize(fp32_model, few)


def test_half_of_a_small_dataset_is_used_for_calibration(fp32_model: ModelProto) -> None:
    _, facts = quantize(fp32_model, replace(source(), load_training_images=at_most(20)))
    assert facts["calibration"].endswith(", 10 training images")


def test_a_single_training_image_is_refused(fp32_model: ModelProto) -> None:
    with pytest.raises(DataError, match=r"^the dataset has 1 training images: int8 needs at least 2"):
        quantize(fp32_model, replace(source(), load_training_images=at_most(1)))


def test_a_model_above_the_limit_of_protobuf_is_refused(
    fp32_model: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_search, "_PROTOBUF_LIMIT", 1000)
    with pytest.raises(
        UsageError,
        match=r"^the network is too large for int8, .* GB: use --precision fp16; the limit of protobuf is 2 GB$",
    ):
        quantize(fp32_model, source())


def test_calibration_images_and_held_out_images_do_not_overlap() -> None:
    numbered = replace(
        source(7), load_training_images=lambda count: np.arange(count, dtype=np.uint8)[:, None, None, None]
    )
    calibration, held_out = search.split_images(numbered, 40)
    assert len(calibration) == 7
    assert sorted([*calibration.ravel(), *held_out.ravel()]) == list(range(47))


# Candidates after a failed parity check. `ResidualNetwork` has five layers, of which up to four can stay in fp32.


def search_with_agreement(
    model: ModelProto, monkeypatch: pytest.MonkeyPatch, *agreement: float
) -> tuple[QuantizationSearch, list[MixedPrecision]]:
    """Return a search that measures this agreement with 0, 1, 2 … layers in fp32, and a list of what it builds."""
    built: list[MixedPrecision] = []
    build = QuantizationSearch.build

    def compare(_: QuantizationSearch, choice: MixedPrecision, *__: float) -> _Trial:
        measured = agreement[len(choice.fp32_layers)]
        return _Trial(Score(measured, 0.0), choice, measured)

    def record(self: QuantizationSearch, choice: MixedPrecision) -> ModelProto:
        built.append(choice)
        return build(self, choice)

    monkeypatch.setattr(QuantizationSearch, "_compare", compare)
    monkeypatch.setattr(QuantizationSearch, "build", record)
    return QuantizationSearch(model, source()), built


@pytest.mark.parametrize(
    ("agreement", "layers"),
    [
        pytest.param([0.5, 0.5, 0.5, 0.5, 0.5], [0], id="nothing helps"),
        pytest.param([0.5, 0.6, 0.7, 0.8, 0.9], [4], id="no target can be reached"),
        pytest.param([0.5, 0.991, 0.99, 0.99, 0.99], [1], id="the first candidate cannot be improved"),
        pytest.param([0.5, 0.98, 0.985, 0.9905, 0.9915], [3, 4], id="a better one misses the next target"),
        pytest.param([0.5, 0.9905, 0.9925, 0.995, 0.999], [1, 2, 3, 4], id="each target takes one more layer"),
        pytest.param([0.991, 0.997, 0.999, 1.0, 1.0], [0, 1, 2, 3], id="all layers in int8 first"),
        pytest.param([0.9, 0.999, 0.999, 0.999, 1.0], [1, 4], id="one step passes several targets"),
        pytest.param([1.0, 1.0, 1.0, 1.0, 1.0], [0], id="perfect agreement cannot be improved"),
    ],
)
def test_each_candidate_differs_and_no_model_is_built_twice(
    fp32_model: ModelProto, monkeypatch: pytest.MonkeyPatch, agreement: list[float], layers: list[int]
) -> None:
    quantization, built = search_with_agreement(fp32_model, monkeypatch, *agreement)
    candidates = list(quantization.candidates())
    assert [len(choice.fp32_layers) for choice in built] == layers
    assert len(candidates) == len(set(built)) == len(built)
    contents = {model.SerializeToString(deterministic=True) for model, _ in candidates}
    assert len(contents) == len(candidates)


def test_the_next_candidate_must_reach_the_next_target_above_the_last(
    fp32_model: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantization, _ = search_with_agreement(fp32_model, monkeypatch, 0.5, 0.9905, 0.9925, 0.995, 0.999)
    targets: list[float] = []
    find = quantization.find

    def record(target: float) -> search._Trial:
        targets.append(target)
        return find(target)

    monkeypatch.setattr(quantization, "find", record)
    assert len(list(quantization.candidates())) == search.MAX_CANDIDATES
    assert targets == list(AGREEMENT_TARGETS[:4])


def test_a_second_iteration_evaluates_nothing_again(fp32_model: ModelProto) -> None:
    """The formats `onnx` and `triton` of one export iterate over the candidates of one search."""
    lines: list[str] = []
    quantization = QuantizationSearch(fp32_model, source(lines=lines))
    first = list(quantization.candidates())
    assert any("calibrating" in line for line in lines)
    lines.clear()
    second = list(quantization.candidates())
    assert not [line for line in lines if "best agreement found" not in line]
    assert [facts for _, facts in second] == [facts for _, facts in first]
    assert [model.SerializeToString(deterministic=True) for model, _ in second] == [
        model.SerializeToString(deterministic=True) for model, _ in first
    ]
