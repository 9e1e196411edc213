"""LiteRT files: their content, that they are reproducible, and that faults in them are found."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifarx_export.export import export
from cifarx_export.formats.litert import converter
from cifarx_export.formats.litert.converter import LiteRtArtifact, RefusedModelError, convert_to_litert
from cifarx_export.formats.registry import ConversionSource, ExportOptions
from cifarx_export.parity.compare import Reference, check_parity, run_reference
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.litert.backend import LiteRtBackend
from cifarx_serve.backends.litert.graph import operator_names
from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.files.checksum import ChecksumState, read_checksum
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, save_checkpoint
from cifarx_train.models.registry import get_architecture
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support.conversion import conversion_source
from tests.support.litert_model import requires_litert_torch
from tests.support.local_paths import assert_no_local_paths

CPU = Device("cpu")


IMAGES = np.random.default_rng(0).integers(0, 256, (67, 4, 4, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
"""Squares of random colors: one batch of 64 images, and three more."""


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    """An untrained network whose logits are spread, so that it predicts every class for some of the images."""
    size, facts = InputSpec(height=32, width=32), {"format": "litert"}
    spec = ModelSpec(model="lzh", class_names=tuple("abcdefghij"), input=size, exporter=facts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = get_architecture("lzh").build(len(spec.class_names), spec.input).eval()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        logits = module(torch.from_numpy(normalize(IMAGES, spec.input)))
    weights["model.8.weight"] /= logits.std(dim=0)[:, None]
    weights["model.8.bias"] = (weights["model.8.bias"] - logits.mean(dim=0)) / logits.std(dim=0)
    return Checkpoint(spec, weights, {})


@pytest.fixture(scope="module")
def artifact(loaded: Checkpoint) -> LiteRtArtifact:
    [artifact] = convert_to_litert(conversion_source(loaded))
    return artifact


@pytest.fixture(scope="module")
def quantized(loaded: Checkpoint) -> list[LiteRtArtifact]:
    return list(convert_to_litert(conversion_source(loaded, "int8")))


@pytest.fixture(scope="module")
def path(artifact: LiteRtArtifact, loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("litert") / "a-name-to-search-for.tflite"
    artifact.save(path, artifact.complete_spec(loaded.spec))
    return path


def test_the_missing_converter_is_named(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(UsageError, match=r"litert-torch is not installed, .* of its own: pip install"):
        next(convert_to_litert(conversion_source(loaded)))


def test_too_few_calibration_images_are_refused_before_any_work(loaded: Checkpoint) -> None:
    with pytest.raises(UsageError, match="0 calibration images are too few: give 1 or more"):
        next(convert_to_litert(conversion_source(loaded, "int8", ExportOptions(calibration_images=0))))


@requires_litert_torch
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_logits_match_the_network_at_any_batch_size(path: Path, loaded: Checkpoint, size: int) -> None:
    inputs = torch.rand(size, 32, 32, 3, generator=torch.Generator().manual_seed(size))
    with LiteRtBackend(path, CPU) as backend, torch.inference_mode():
        logits, expected = backend.run(inputs.numpy()), loaded.build()(inputs.permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@requires_litert_torch
@pytest.mark.slow
def test_the_spec_states_the_layout_and_the_libraries(path: Path, loaded: Checkpoint) -> None:
    spec = LiteRtBackend.read_spec(path)
    assert spec.input == msgspec.structs.replace(loaded.spec.input, layout="NHWC")
    assert spec.exporter is not None
    assert {"litert-torch", "ai-edge-litert"} <= spec.exporter.keys()
    assert read_checksum(path).state is ChecksumState.INTACT


@requires_litert_torch
@pytest.mark.slow
def test_another_conversion_has_the_same_bytes(path: Path, loaded: Checkpoint, tmp_path: Path) -> None:
    [again] = convert_to_litert(conversion_source(loaded))
    again.save(tmp_path / "again.tflite", again.complete_spec(loaded.spec))
    assert (tmp_path / "again.tflite").read_bytes() == path.read_bytes()


@requires_litert_torch
@pytest.mark.slow
def test_no_name_of_this_machine_or_of_a_module_is_in_a_file(path: Path) -> None:
    content = path.read_bytes()
    assert b"a-name-to-search-for" not in content
    assert b"cifarx_train" not in content
    assert b"torch.nn" not in content
    assert_no_local_paths(content)


# --- int8


@requires_litert_torch
@pytest.mark.slow
def test_the_candidates_of_int8_end_with_fixed_ranges(quantized: list[LiteRtArtifact], loaded: Checkpoint) -> None:
    specs = [candidate.complete_spec(loaded.spec).exporter or {} for candidate in quantized]
    assert [spec["activations"] for spec in specs] == [
        "8 bits, ranges of each image",
        "8 bits, ranges of each image",
        "8 bits, ranges fixed: minmax, 512 training images",
    ]
    assert [spec["weights"].rpartition(", ")[2] for spec in specs] == ["minmax", "OCTAV", "minmax"]


@requires_litert_torch
@pytest.mark.slow
def test_every_candidate_of_int8_takes_and_returns_floats(
    quantized: list[LiteRtArtifact], artifact: LiteRtArtifact, loaded: Checkpoint, tmp_path: Path
) -> None:
    inputs = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    with torch.inference_mode():
        expected = loaded.build()(torch.from_numpy(inputs).permute(0, 3, 1, 2)).numpy()
    for candidate in quantized:
        assert len(candidate.content) < 0.3 * len(artifact.content)
        assert [check.passed for check in candidate.checks] == [True]
        candidate.save(tmp_path / "a.tflite", candidate.complete_spec(loaded.spec))
        with LiteRtBackend(tmp_path / "a.tflite", CPU) as backend:
            logits = backend.run(inputs)
        assert 0 < np.abs(logits - expected).max() < 0.2 * np.abs(expected).max()
    assert ["QUANTIZE" in operator_names(candidate.content) for candidate in quantized] == [False, False, True]


class Depthwise(nn.Module):
    """A small network with a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.depthwise(torch.relu(self.expand(images)))).mean((2, 3)))
        return logits


@requires_litert_torch
@pytest.mark.slow
def test_fixed_ranges_come_first_for_depthwise_convolutions(loaded: Checkpoint) -> None:
    source = conversion_source(loaded, "int8", module=Depthwise().eval())
    candidates = convert_to_litert(source)
    first, second = next(candidates), next(candidates)
    facts = second.complete_spec(loaded.spec).exporter or {}
    assert facts["fp32 layers"] == "depthwise convolutions"
    assert "ranges fixed" in (first.complete_spec(loaded.spec).exporter or {})["activations"]
    assert {"QUANTIZE", "DEPTHWISE_CONV_2D"} <= set(operator_names(first.content))


@requires_litert_torch
@pytest.mark.slow
def test_a_candidate_that_the_backend_does_not_open_is_skipped(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RefusedModelError("the LiteRT model is damaged", "use --format onnx")

    lines: list[str] = []
    source = dataclasses.replace(conversion_source(loaded, "int8"), progress=lines.append)
    monkeypatch.setattr(converter, "_quantize_static", refuse)
    assert len(list(convert_to_litert(source))) == 2
    assert "int8: the LiteRT model is damaged" in lines
    monkeypatch.setattr(converter, "_quantize", refuse)
    with pytest.raises(RefusedModelError, match="is damaged"):
        list(convert_to_litert(source))


class Spectrum(nn.Module):
    """A network with a Fourier transform."""

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = torch.fft.fft2(images).abs().mean((1, 2))[:, :10]
        return outputs


@requires_litert_torch
@pytest.mark.slow
def test_what_litert_cannot_convert_is_one_line(loaded: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"LiteRT .*: use --format onnx") as raised:
        next(convert_to_litert(conversion_source(loaded, module=Spectrum().eval())))
    assert "\n" not in str(raised.value)


# --- planted faults: each is in a real file, runs in LiteRT, and must fail the expected check

RUNS = {"batch 1", "batch 3", "batch 64", "edge inputs"}
VALUES = {"tolerance", "agreement"}


class Fault(NamedTuple):
    """Changes the model or the spec; `must_fail` are checks that fail, `may_fail` may, all others pass."""

    model: Callable[[Any], object] | None
    spec: Callable[[ModelSpec], ModelSpec] | None
    must_fail: set[str]
    may_fail: set[str] = frozenset()  # type: ignore[assignment]


def of_model(change: Callable[[Any], object], must_fail: set[str] = VALUES, may_fail: set[str] = frozenset()) -> Fault:  # type: ignore[assignment]
    return Fault(change, None, must_fail, may_fail)


def of_input(must_fail: set[str], may_fail: set[str] = frozenset(), **fields: Any) -> Fault:  # type: ignore[assignment]
    def change(spec: ModelSpec) -> ModelSpec:
        return msgspec.structs.replace(spec, input=msgspec.structs.replace(spec.input, **fields))

    return Fault(None, change, must_fail, may_fail)


def weights(model: Any, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the only constant of this shape."""
    [tensor] = [tensor for tensor in model.subgraphs[0].tensors if tuple(tensor.shape) == shape and tensor.buffer]
    values = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float32).reshape(shape)
    model.buffers[tensor.buffer].data = np.frombuffer(change(values.copy()).astype(np.float32).tobytes(), np.uint8)


def with_entry(position: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[position] += value
        return values

    return change


def average_pooling(model: Any) -> None:
    [code] = [code for code in model.operatorCodes if code.builtinCode == 17]
    code.builtinCode = code.deprecatedBuiltinCode = 1


def without_bias(model: Any) -> None:
    model.subgraphs[0].operators[-1].inputs[2] = -1


def without_transpose(model: Any) -> None:
    """Flatten the channels last, as a network of another library would."""
    order = next(tensor for tensor in model.subgraphs[0].tensors if tuple(tensor.shape) == (4,) and tensor.buffer)
    model.buffers[order.buffer].data = np.frombuffer(np.array([0, 1, 2, 3], "<i4").tobytes(), np.uint8)
    transposed = next(
        tensor for tensor in model.subgraphs[0].tensors if tuple(tensor.shape) == (1, 64, 4, 4) and not tensor.buffer
    )
    transposed.shape = [1, 4, 4, 64]


def saturated(model: Any) -> None:
    """Clip the logits to 0 to 6, as a wrong range of int8 does."""
    model.subgraphs[0].operators[-1].builtinOptions.fusedActivationFunction = 3


FIRST, LAST, BIAS = (32, 5, 5, 3), (10, 64), (10,)

FAULTS = {
    "mean of the spec": of_input({"preprocessing", "tolerance"}, VALUES, mean=(0.49, 0.48, 0.45)),
    "std of the spec": of_input({"preprocessing", "tolerance"}, VALUES, std=(0.25, 0.25, 0.25)),
    "BGR instead of RGB": of_input({"preprocessing", "tolerance"}, VALUES, color="BGR"),
    "resize filter of the spec": of_input({"preprocessing"}, interpolation="nearest"),
    "layout of the spec": of_input({"interface"} | RUNS, layout="NCHW"),
    "class names permuted": Fault(
        None, lambda spec: msgspec.structs.replace(spec, class_names=spec.class_names[::-1]), {"class names"}
    ),
    "channels swapped": of_model(lambda model: weights(model, FIRST, lambda values: values[..., ::-1])),
    "kernels transposed": of_model(lambda model: weights(model, FIRST, lambda values: values.swapaxes(1, 2))),
    "stale weights": of_model(
        lambda model: weights(model, FIRST, lambda values: np.random.default_rng(0).permutation(values))
    ),
    "classes in another order": of_model(lambda model: weights(model, LAST, lambda values: np.roll(values, 1, 0))),
    "one bias off by three tolerances": of_model(
        lambda model: weights(model, BIAS, with_entry(4, 3e-4)), {"tolerance"}, VALUES
    ),
    "rounded to float16": of_model(
        lambda model: weights(model, FIRST, lambda values: values.astype(np.float16)), {"tolerance"}, VALUES
    ),
    "NaN in one class": of_model(
        lambda model: weights(model, BIAS, with_entry(3, float("nan"))), {"finite", "agreement"}
    ),
    "saturation": of_model(saturated, {"tolerance"}, VALUES),
    "average instead of maximum": of_model(average_pooling),
    "dropped bias": of_model(without_bias, {"tolerance"}, VALUES),
    "channels flattened last": of_model(without_transpose),
}


@pytest.fixture(scope="module")
def reference(loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = tmp_path_factory.mktemp("reference") / "lzh_0.pth"
    save_checkpoint(path, loaded)
    with PyTorchBackend(path, CPU) as backend:
        return run_reference(backend, ParityData(IMAGES, None, "squares", "0" * 64))


def failed_checks(path: Path, reference: Reference) -> tuple[set[str], str]:
    with LiteRtBackend(path, CPU) as backend:
        result = check_parity(reference, backend, get_tolerance("fp32"))
    return {check.name for check in result.failures}, str(result.checks)


def with_fault(fault: Fault, artifact: LiteRtArtifact, spec: ModelSpec, path: Path) -> Path:
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(artifact.content)
    if fault.model is not None:
        fault.model(model)
    changed = fault.spec(spec) if fault.spec else spec
    LiteRtArtifact(bytes(flatbuffer_utils.convert_object_to_bytearray(model)), {}).save(path, changed)
    return path


@requires_litert_torch
@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(
    name: str, artifact: LiteRtArtifact, loaded: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    fault = FAULTS[name]
    path = with_fault(fault, artifact, artifact.complete_spec(loaded.spec), tmp_path / "faulty.tflite")
    failed, text = failed_checks(path, reference)
    assert fault.must_fail <= failed <= fault.must_fail | fault.may_fail, text


@requires_litert_torch
@pytest.mark.slow
def test_a_file_made_in_the_same_way_without_a_fault_passes(
    artifact: LiteRtArtifact, loaded: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    path = with_fault(of_model(lambda _: None), artifact, artifact.complete_spec(loaded.spec), tmp_path / "a.tflite")
    failed, text = failed_checks(path, reference)
    assert not failed, text


@requires_litert_torch
@pytest.mark.slow
def test_a_model_for_several_images_is_refused(artifact: LiteRtArtifact, loaded: Checkpoint, tmp_path: Path) -> None:
    def for_two(model: Any) -> None:
        for tensor in model.subgraphs[0].tensors:
            tensor.shape[0] = 2 if not tensor.buffer else tensor.shape[0]

    path = with_fault(of_model(for_two), artifact, artifact.complete_spec(loaded.spec), tmp_path / "a.tflite")
    with pytest.raises(ModelFileError, match="is not for one image"):
        LiteRtBackend(path, CPU)


@requires_litert_torch
@pytest.mark.slow
def test_a_network_that_takes_nhwc_is_converted_as_it_is(loaded: Checkpoint, tmp_path: Path) -> None:
    class Last(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images.permute(0, 3, 1, 2))
            return logits

    spec = msgspec.structs.replace(loaded.spec, input=msgspec.structs.replace(loaded.spec.input, layout="NHWC"))
    source: ConversionSource = dataclasses.replace(
        conversion_source(loaded, module=Last(loaded.build()).eval()), spec=spec
    )
    [converted] = convert_to_litert(source)
    converted.save(tmp_path / "a.tflite", converted.complete_spec(spec))
    inputs = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)
    with LiteRtBackend(tmp_path / "a.tflite", CPU) as backend, torch.inference_mode():
        expected = loaded.build()(torch.from_numpy(inputs).permute(0, 3, 1, 2)).numpy()
        np.testing.assert_allclose(backend.run(inputs), expected, rtol=1e-4, atol=1e-4)


@requires_litert_torch
@pytest.mark.slow
def test_an_onnx_file_is_converted(confident_checkpoint: Path, tmp_path: Path) -> None:
    given = confident_checkpoint.with_suffix(".onnx")
    [made] = export(given, ["litert"], data="builtin", out=tmp_path)
    assert made.report.summary.passed, made.report.checks
    assert made.path.suffix == ".tflite"
    assert made.report.checkpoint == given.name
