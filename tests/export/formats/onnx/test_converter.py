"""ONNX files: their content, and that they are reproducible."""

import getpass
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from cifarx_export.formats.onnx.converter import DEFAULT_OPSET, OnnxArtifact, convert_to_onnx
from cifarx_export.formats.registry import ExportOptions
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from tests.support.conversion import conversion_source
from tests.support.local_paths import assert_no_local_paths


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module", params=[None, 20, 23])
def opset(request: pytest.FixtureRequest) -> int | None:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def artifact(loaded: Checkpoint, opset: int | None) -> OnnxArtifact:
    return next(convert_to_onnx(conversion_source(loaded, options=ExportOptions(opset=opset))))


@pytest.fixture(scope="module")
def path(artifact: OnnxArtifact, loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "lzh.onnx"
    artifact.save(path, loaded.spec)
    return path


def batch(size: int) -> NDArray[np.float32]:
    return np.random.default_rng(size).random((size, 3, 32, 32), dtype=np.float32)


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def run_model(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits: NDArray[np.float32] = session.run(["logits"], {"input": inputs})[0]
    return logits


def test_the_model_is_one_valid_file(path: Path) -> None:
    onnx.checker.check_model(path, full_check=True)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    assert tensors
    assert all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in tensors)


def test_only_the_batch_axes_of_input_and_logits_are_dynamic(path: Path) -> None:
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output] == ["logits"]
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert dimensions(graph.input[0]) == ["batch", 3, 32, 32]
    assert dimensions(graph.output[0]) == ["batch", 10]


def test_the_opset_is_the_requested_one(path: Path, opset: int | None) -> None:
    imports = onnx.load(path).opset_import
    assert [(entry.domain, entry.version) for entry in imports] == [("", opset or 18)]


def test_the_spec_is_its_only_metadata(path: Path, loaded: Checkpoint) -> None:
    entries = onnx.load(path).metadata_props
    assert [entry.key for entry in entries] == [SPEC_KEY]
    assert ModelSpec.from_json(entries[0].value, "test") == loaded.spec


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_logits_match_the_network_at_any_batch_size(path: Path, loaded: Checkpoint, size: int) -> None:
    inputs = batch(size)
    with torch.inference_mode():
        expected = loaded.build()(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(run_model(path, inputs), expected, rtol=1e-4, atol=1e-4)


def texts(message: object) -> Iterator[str]:
    """Yield every string of a protobuf message, also of nested messages. Weights are bytes, which are skipped."""
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        values = [value] if isinstance(value, str | bytes) or not hasattr(value, "__len__") else value
        for entry in values:
            if isinstance(entry, str):
                yield entry
            elif isinstance(entry, bytes) and field.name != "raw_data":
                yield entry.decode(errors="replace")
            elif hasattr(entry, "ListFields"):
                yield from texts(entry)


def test_the_file_contains_nothing_about_this_machine(path: Path) -> None:
    content = path.read_bytes()
    assert_no_local_paths(content)
    for mark in (b"stack_trace", b"site-packages", b".py", b"Traceback"):
        assert mark not in content
    all_texts = "\n".join(texts(onnx.load(path)))
    assert SPEC_KEY in all_texts
    for name in (getpass.getuser(), socket.gethostname()):
        assert not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", all_texts)


def test_saving_with_another_spec_changes_only_the_spec(
    artifact: OnnxArtifact, path: Path, loaded: Checkpoint, tmp_path: Path
) -> None:
    other = msgspec.structs.replace(loaded.spec, exporter={"format": "onnx"})
    artifact.save(tmp_path / "other.onnx", other)
    first, second = onnx.load(path), onnx.load(tmp_path / "other.onnx")
    assert ModelSpec.from_json(second.metadata_props[0].value, "test") == other
    del first.metadata_props[:], second.metadata_props[:]
    assert first == second
    artifact.save(tmp_path / "again.onnx", loaded.spec)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_converting_prints_nothing_and_does_not_modify_the_network(
    loaded: Checkpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    module = loaded.build()
    generator = torch.get_rng_state()
    next(convert_to_onnx(conversion_source(loaded, module=module)))
    assert tuple(capfd.readouterr()) == ("", "")
    assert not module.training
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.weights[name])


def test_the_opset_is_added_to_the_spec(artifact: OnnxArtifact, loaded: Checkpoint, opset: int | None) -> None:
    exported = msgspec.structs.replace(loaded.spec, exporter={"format": "onnx"})
    assert artifact.complete_spec(exported).exporter == {"format": "onnx", "opset": str(opset or DEFAULT_OPSET)}
    others = msgspec.structs.replace(artifact.complete_spec(exported), exporter=None, minimum_onnxruntime=None)
    assert others == loaded.spec


def test_the_default_opset_is_18() -> None:
    assert DEFAULT_OPSET == 18


_CONVERT = """
import sys
from pathlib import Path
from tests.support.conversion import write_artifact
from cifarx_export.formats.registry import ExportOptions
checkpoint, *kinds = sys.argv[1:]
for kind in kinds:
    precision, embed = kind.split()
    options = ExportOptions(embed_preprocessing=embed == "embedded" or None)
    Path(kind).mkdir()
    write_artifact(Path(checkpoint), "onnx", Path(kind, "lzh_9.onnx"), precision=precision, options=options)
"""

KINDS = ("fp32 plain", "fp32 embedded", "fp16 plain", "int8 embedded")


@pytest.fixture(scope="module")
def written(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a file of each kind in two processes, and return their folders."""
    folders = []
    for seed in ("1", "4321"):
        folder = tmp_path_factory.mktemp("written")
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[4])}
        command = [sys.executable, "-c", _CONVERT, str(checkpoint), *KINDS]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
        assert ran.returncode == 0, ran.stderr[-2000:]
        folders.append(folder)
    return folders


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_the_same_bytes(kind: str, written: list[Path]) -> None:
    """The hash seeds differ, so sets of strings are in another order."""
    one, other = ((folder / kind / "lzh_9.onnx").read_bytes() for folder in written)
    assert one == other
    assert os.fsencode(written[0].parent) not in one
    for mark in (b"stack_trace", b"site-packages", b".py", b"Traceback"):
        assert mark not in one
