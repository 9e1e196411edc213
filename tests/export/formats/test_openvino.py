"""OpenVINO archives: their content, and that they are reproducible."""

import dataclasses
import re
import sys
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from onnx import helper

from cifarx_export.formats.onnx.converter import OnnxArtifact, convert_to_onnx
from cifarx_export.formats.openvino import OpenVinoArtifact, convert_artifact, convert_to_openvino
from cifarx_serve.backends.openvino import GRAPH_FILE, SPEC_FILE, WEIGHTS_FILE, OpenVinoBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import ChecksumState, read_checksum
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from tests.support.conversion import conversion_source
from tests.support.local_paths import assert_no_local_paths

pytest.importorskip("openvino")

CPU = Device("cpu")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def artifact(loaded: Checkpoint) -> OpenVinoArtifact:
    [artifact] = convert_to_openvino(conversion_source(loaded))
    return artifact


@pytest.fixture(scope="module")
def path(artifact: OpenVinoArtifact, loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openvino") / "a-name-to-search-for.openvino.zip"
    artifact.save(path, artifact.complete_spec(loaded.spec))
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_logits_match_the_network_at_any_batch_size(path: Path, loaded: Checkpoint, size: int) -> None:
    inputs = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
    with OpenVinoBackend(path, CPU) as backend, torch.inference_mode():
        logits, expected = backend.run(inputs.numpy()), loaded.build()(inputs).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_archive_holds_the_graph_the_weights_and_the_spec(path: Path, loaded: Checkpoint) -> None:
    content = members(path)
    assert list(content) == [GRAPH_FILE, WEIGHTS_FILE, SPEC_FILE]
    spec = ModelSpec.from_json(content[SPEC_FILE], "the archive")
    assert spec.class_names == loaded.spec.class_names
    assert spec.exporter is not None
    assert {"opset", "openvino"} <= spec.exporter.keys()
    assert read_checksum(path).state is ChecksumState.INTACT


def test_weights_are_not_rounded_to_float16(path: Path) -> None:
    assert b'element_type="f16"' not in members(path)[GRAPH_FILE]


def test_another_conversion_has_the_same_bytes(path: Path, loaded: Checkpoint, tmp_path: Path) -> None:
    """OpenVINO numbers operations per process, so a second conversion would have other names."""
    [again] = convert_to_openvino(conversion_source(loaded))
    again.save(tmp_path / "again.openvino.zip", again.complete_spec(loaded.spec))
    assert (tmp_path / "again.openvino.zip").read_bytes() == path.read_bytes()


def test_another_spec_changes_only_the_spec(artifact: OpenVinoArtifact, loaded: Checkpoint, tmp_path: Path) -> None:
    specs = [msgspec.structs.replace(loaded.spec, model=name) for name in ("first", "other")]
    contents = []
    for spec in specs:
        artifact.save(tmp_path / "a.openvino.zip", spec)
        contents.append(members(tmp_path / "a.openvino.zip"))
    first, other = contents
    assert {name for name in first if first[name] != other[name]} == {SPEC_FILE}


def test_no_path_of_this_machine_is_in_a_file(path: Path) -> None:
    for content in members(path).values():
        assert b"a-name-to-search-for" not in content
    assert_no_local_paths(path.read_bytes())


def test_bf16_keeps_the_weights_in_float32(artifact: OpenVinoArtifact, loaded: Checkpoint, tmp_path: Path) -> None:
    [rounded] = convert_to_openvino(conversion_source(loaded, "bf16"))
    assert [check.name for check in rounded.checks] == ["bfloat16 range", "bfloat16 agreement"]
    for kept, name in ((artifact, "fp32"), (rounded, "bf16")):
        kept.save(tmp_path / f"{name}.openvino.zip", loaded.spec)
    assert members(tmp_path / "bf16.openvino.zip") == members(tmp_path / "fp32.openvino.zip")


@pytest.mark.slow
def test_int8_weights_are_stored_in_int8(loaded: Checkpoint, path: Path, tmp_path: Path) -> None:
    quantized = next(iter(convert_to_openvino(conversion_source(loaded, "int8"))))
    quantized.save(tmp_path / "int8.openvino.zip", loaded.spec)
    content = members(tmp_path / "int8.openvino.zip")
    assert len(re.findall(rb'element_type="i8"', content[GRAPH_FILE])) >= 3
    assert len(content[WEIGHTS_FILE]) < 0.5 * len(members(path)[WEIGHTS_FILE])
    assert [check.name for check in quantized.checks] == ["int8 gain"]


def test_an_operator_that_openvino_does_not_have_is_named(loaded: Checkpoint) -> None:
    [onnx] = convert_to_onnx(conversion_source(loaded))
    onnx.model.graph.node[0].op_type, onnx.model.graph.node[0].domain = "Spin", "org.example"
    onnx.model.opset_import.append(helper.make_opsetid("org.example", 1))
    with pytest.raises(
        UsageError, match=r"OpenVINO cannot read the ONNX model \(.*Spin.*\): use --format onnx"
    ) as raised:
        convert_artifact(OnnxArtifact(onnx.model, onnx.facts))
    assert "\n" not in str(raised.value)


def test_the_missing_library_is_named(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    source = conversion_source(loaded)
    [onnx] = convert_to_onnx(source)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r'OpenVINO is not installed: pip install "cifarx\[openvino\]"'):
        convert_artifact(onnx)


def test_an_onnx_file_becomes_an_openvino_file(loaded: Checkpoint, artifact: OpenVinoArtifact, tmp_path: Path) -> None:
    source = conversion_source(loaded)
    [onnx] = convert_to_onnx(source)

    def no_module() -> torch.nn.Module:
        raise AssertionError("an ONNX file has no module")

    [made] = convert_to_openvino(dataclasses.replace(source, build_module=no_module, load_onnx=lambda: onnx.model))
    for kept, name in ((artifact, "module"), (made, "onnx")):
        kept.save(tmp_path / f"{name}.openvino.zip", loaded.spec)
    assert members(tmp_path / "onnx.openvino.zip") == members(tmp_path / "module.openvino.zip")
