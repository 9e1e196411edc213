"""Directories for browsers: their content, that they are reproducible, and faults that the parity check must find."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnx
import pytest
from torch import nn

from cifarx_export.formats.onnx.converter import OnnxArtifact, convert_to_onnx
from cifarx_export.formats.onnx.preprocessing import embed_preprocessing
from cifarx_export.formats.registry import ExportOptions
from cifarx_export.formats.web.converter import WebArtifact, convert_to_web
from cifarx_export.parity.compare import EVAL_BATCH_SIZE, Reference, check_parity, run_reference
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.registry import open_backend, read_spec
from cifarx_serve.backends.web.directory import (
    CHECKSUMS_FILE,
    FILES,
    MODEL_FILE,
    SPEC_FILE,
    require_intact_directory,
)
from cifarx_serve.backends.web.node_package import find_package
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import ChecksumState, read_checksum
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support.command_line import Cli
from tests.support.conversion import conversion_source
from tests.support.local_paths import assert_no_local_paths
from tests.support.onnx_faults import (
    Edit,
    channels_swapped,
    entry_with,
    first_for_all,
    frozen_batch,
    mean_baked,
    nan_for_black,
    permuted_classes,
    quantized,
    rounded_to_float16,
    rows_shifted,
    softmaxed,
    weights_with,
    wrong_at_batch,
)
from tests.support.web import requires_web

FEW = EVAL_BATCH_SIZE + 3


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def artifact(loaded: Checkpoint) -> WebArtifact:
    [artifact] = convert_to_web(conversion_source(loaded))
    return artifact


@pytest.fixture(scope="module")
def directory(artifact: WebArtifact, loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("web") / "a-name-to-search-for.web"
    path.mkdir()
    artifact.save(path, artifact.complete_spec(loaded.spec))
    return path


@requires_web
@pytest.mark.slow
def test_a_directory_holds_the_model_the_page_the_runtime_and_the_spec(directory: Path, loaded: Checkpoint) -> None:
    files = content(directory)
    assert files.keys() == {*FILES, CHECKSUMS_FILE}
    require_intact_directory(directory)
    assert read_checksum(directory / MODEL_FILE).state is ChecksumState.INTACT
    spec = read_spec(directory)
    assert ModelSpec.from_json(files[SPEC_FILE], SPEC_FILE) == spec
    assert spec.class_names == loaded.spec.class_names
    assert spec.embedded_preprocessing
    assert spec.exporter is not None
    assert spec.exporter["onnxruntime-web"] == find_package().version
    assert files["runtime/ort.wasm"] == find_package().wasm.read_bytes()


@requires_web
@pytest.mark.slow
def test_another_conversion_has_the_same_bytes(directory: Path, loaded: Checkpoint, tmp_path: Path) -> None:
    [again] = convert_to_web(conversion_source(loaded))
    for _ in range(2):  # as after the parity check, when the spec is complete
        again.save(tmp_path, again.complete_spec(loaded.spec))
    assert content(tmp_path) == content(directory)


@requires_web
@pytest.mark.slow
def test_another_spec_changes_only_the_spec(artifact: WebArtifact, loaded: Checkpoint, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "other"):
        artifact.save(tmp_path, artifact.complete_spec(msgspec.structs.replace(loaded.spec, model=name)))
        contents.append(content(tmp_path))
    first, other = contents
    assert {name for name in first if first[name] != other[name]} == {MODEL_FILE, SPEC_FILE, CHECKSUMS_FILE}


@requires_web
@pytest.mark.slow
def test_no_path_of_this_machine_is_in_a_file(directory: Path) -> None:
    for name, text in content(directory).items():
        assert b"a-name-to-search-for" not in text
        if not name.startswith("runtime/"):
            assert_no_local_paths(text)


@requires_web
@pytest.mark.slow
def test_an_onnx_file_becomes_a_directory(loaded: Checkpoint, directory: Path, tmp_path: Path) -> None:
    source = conversion_source(loaded)
    [model] = convert_to_onnx(source)

    def no_module() -> nn.Module:
        raise AssertionError("an ONNX file has no module")

    [made] = convert_to_web(dataclasses.replace(source, build_module=no_module, load_onnx=lambda: model.model))
    made.save(tmp_path, made.complete_spec(loaded.spec))
    assert content(tmp_path) == content(directory)


@requires_web
@pytest.mark.slow
def test_an_onnx_file_of_an_old_opset_is_refused(loaded: Checkpoint) -> None:
    source = conversion_source(loaded, options=ExportOptions(opset=17))
    [model] = convert_to_onnx(source)
    with pytest.raises(UsageError, match="--format web needs opset 18, and the model has 17: "):
        next(iter(convert_to_web(dataclasses.replace(source, load_onnx=lambda: model.model))))


def test_the_missing_package_is_named_before_any_work(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_PATH", raising=False)

    def no_module() -> nn.Module:
        raise AssertionError("the network is not needed yet")

    source = dataclasses.replace(conversion_source(loaded), build_module=no_module)
    with pytest.raises(UsageError, match=r"onnxruntime-web is not installed .*: npm install onnxruntime-web$"):
        next(iter(convert_to_web(source)))


@requires_web
@pytest.mark.slow
def test_export_and_inspect(checkpoint: Path, cli: Cli, tmp_path: Path) -> None:
    shutil.copy(checkpoint, "lzh_0.pth")
    ran = cli("export", "--ckpt", "lzh_0.pth", "--format", "web", "--data", "builtin")
    assert ran.status == 0, ran.err
    name = "lzh_0.web"
    size = sum(map(len, content(tmp_path / name).values()))
    assert f"wrote {name} ({size:,} bytes)" in ran.err
    assert cli("inspect", name, "--check").status == 0
    parity = read_spec(tmp_path / name).parity
    assert parity is not None
    assert parity.batch_sizes == (1, 3, 64)
    assert parity.provider.startswith("ONNX Runtime Web 1.")
    page = tmp_path / name / "page.js"
    page.write_text(page.read_text() + " ")
    checked = cli("inspect", name, "--check")
    assert (checked.status, checked.error) == (
        1,
        f"error: the checksum of {name}/page.js does not match: copy the directory again, or export it again",
    )


# Planted faults: each is in a directory with valid checksums, runs in WebAssembly, and must fail the expected check.


class Fault(NamedTuple):
    """Edits of the ONNX model before the preprocessing is embedded, and of the spec. `fails` are checks that fail."""

    fails: set[str]
    edits: tuple[Edit, ...] = ()
    change: Callable[[ModelSpec], ModelSpec] = lambda spec: spec
    embedded: Callable[[ModelSpec], ModelSpec] = lambda spec: spec


def of_input(**changes: object) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: msgspec.structs.replace(spec, input=msgspec.structs.replace(spec.input, **changes))


def rolled(values: np.ndarray) -> np.ndarray:
    return np.roll(values, 1, axis=0)


LAST = ("model.8.weight", "model.8.bias")
FAULTS = {
    "none": Fault(set()),
    "channel order": Fault({"tolerance"}, (channels_swapped(),)),
    "channel order of the preprocessing": Fault({"tolerance"}, embedded=of_input(color="BGR")),
    "channel order of the spec": Fault({"preprocessing"}, change=of_input(color="BGR")),
    "mean": Fault({"tolerance"}, (mean_baked(0.05),)),
    "mean of the preprocessing": Fault({"tolerance"}, embedded=of_input(mean=(0.49, 0.48, 0.45))),
    "standard deviation of the preprocessing": Fault({"tolerance"}, embedded=of_input(std=(0.25, 0.25, 0.25))),
    "another resize": Fault({"resize"}, embedded=of_input(interpolation="nearest")),
    "a resize without antialias": Fault({"resize"}, embedded=of_input(antialias=False)),
    "dropped layer": Fault({"tolerance"}, (weights_with("model.4.weight", np.zeros_like),)),
    "stale weights": Fault({"tolerance"}, (weights_with("model.0.weight", lambda values: 0.9 * values),)),
    "swapped classes": Fault({"tolerance", "agreement"}, tuple(weights_with(name, rolled) for name in LAST)),
    "swapped names": Fault({"class names"}, change=permuted_classes),
    "saturation": Fault({"tolerance"}, (quantized(1e-3),)),
    "rounding": Fault({"tolerance"}, (rounded_to_float16(),)),
    "softmax": Fault({"tolerance"}, (softmaxed(),)),
    "NaN for a black image": Fault({"finite"}, (nan_for_black(),)),
    "NaN in one class": Fault({"finite"}, (entry_with((3,), lambda _: float("nan"), "model.8.bias"),)),
    "batch of one broadcast": Fault({"tolerance"}, (first_for_all(),)),
    "batch frozen at 64": Fault({"interface"}, (frozen_batch(64),)),
    "wrong at batch 3 alone": Fault({"tolerance"}, (wrong_at_batch(3),)),
    "rows of another image": Fault({"tolerance"}, (rows_shifted(),)),
}


@pytest.fixture(scope="module")
def reference(confident_checkpoint: Path, parity_images: ParityData) -> Reference:
    assert parity_images.labels is not None
    few = parity_images._replace(images=parity_images.images[:FEW], labels=parity_images.labels[:FEW])
    with PyTorchBackend(confident_checkpoint, Device("cpu")) as backend:
        return run_reference(backend, few)


@requires_web
@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, confident_checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    fault = FAULTS[name]
    model = onnx.load(confident_checkpoint.with_suffix(".onnx"))
    for edit in fault.edits:
        edit(model)
    embedded = embed_preprocessing(model, fault.embedded(reference.spec).input)
    artifact = WebArtifact(OnnxArtifact(embedded, {}), find_package())
    (tmp_path / "net.web").mkdir()
    artifact.save(tmp_path / "net.web", artifact.complete_spec(fault.change(reference.spec)))
    with open_backend(tmp_path / "net.web") as backend:
        result = check_parity(reference, backend, get_tolerance("fp32"))
    failed = {check.name for check in result.checks if not check.passed}
    assert fault.fails <= failed, str(result.checks)
    assert bool(fault.fails) == bool(failed)
