"""TorchScript archives: what is inside, what is not, and as far as PyTorch allows, the same every time."""

import getpass
import re
import socket
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from cifarx_export.formats.torchscript import TorchScriptArtifact, convert_to_torchscript
from cifarx_serve.backends.torch.torchscript import SPEC_FILE
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from tests.support.conversion_source import source_of
from tests.support.machine_traces import require_no_folders

needs_torchscript = pytest.mark.skipif(sys.version_info >= (3, 14), reason="PyTorch has no TorchScript here")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def artifact(loaded: Checkpoint) -> TorchScriptArtifact:
    return convert_to_torchscript(source_of(loaded))


@pytest.fixture(scope="module")
def path(artifact: TorchScriptArtifact, loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchscript") / "a-name-to-look-for.torchscript.pt"
    artifact.save(path, loaded.spec)
    return path


def load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        return torch.jit.load(str(path))


def entries(path: Path) -> dict[str, bytes]:
    """The archive's files by name, without the folder that all of them lie in."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def without_counter(name: str, content: bytes) -> tuple[str, bytes]:
    """PyTorch numbers the classes that a process has traced; the number is in the class's name."""
    return re.sub(r"_mangle_\d+", "", name), re.sub(rb"_mangle_\d+", b"", content)


@needs_torchscript
@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_it_answers_as_the_network_at_any_batch(path: Path, loaded: Checkpoint, size: int) -> None:
    inputs = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
    module = load(path)
    with torch.inference_mode():
        logits, expected = module(inputs), loaded.build()(inputs)
    assert (logits.dtype, tuple(logits.shape)) == (torch.float32, (size, 10))
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


@needs_torchscript
@pytest.mark.parametrize("size", [1, 3, 64])
def test_in_half_precision_it_nearly_answers_as_the_network(loaded: Checkpoint, tmp_path: Path, size: int) -> None:
    source = source_of(loaded, "fp16")
    path = tmp_path / "half.torchscript.pt"
    convert_to_torchscript(source).save(path, source.spec)
    inputs = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
    module = load(path)
    with torch.inference_mode():
        logits, expected = module(inputs), loaded.build()(inputs)
    assert (logits.dtype, tuple(logits.shape)) == (torch.float32, (size, 10))
    assert not torch.equal(logits, expected)
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=1e-2, atol=1e-2)


@needs_torchscript
def test_half_precision_halves_the_file(path: Path, loaded: Checkpoint, tmp_path: Path) -> None:
    source = source_of(loaded, "fp16")
    convert_to_torchscript(source).save(tmp_path / "half.torchscript.pt", source.spec)
    weights = sum(value.nbytes for value in loaded.model.values())
    saved = path.stat().st_size - (tmp_path / "half.torchscript.pt").stat().st_size
    assert saved == pytest.approx(weights / 2, rel=0.02)


@needs_torchscript
def test_the_weights_are_frozen_in(path: Path) -> None:
    module = load(path)
    assert list(module.parameters()) == []
    assert list(module.buffers()) == []
    assert module.state_dict() == {}


@needs_torchscript
def test_an_exported_file_does_not_allow_tf32(good_torchscript: Path) -> None:
    """Tracing writes the process's setting into every convolution, where a GPU would find it."""
    graph = load(good_torchscript).inlined_graph
    convolutions = graph.findAllNodes("aten::_convolution")
    assert len(convolutions) == 3
    for convolution in convolutions:
        allow_tf32 = list(convolution.inputs())[-1]
        assert "allow_tf32" in convolution.schema().rpartition("->")[0].rpartition(",")[2]
        assert allow_tf32.toIValue() is False


@needs_torchscript
def test_the_spec_is_its_only_extra_file(path: Path, loaded: Checkpoint) -> None:
    extra = {name: content for name, content in entries(path).items() if name.startswith("extra/")}
    assert set(extra) == {f"extra/{SPEC_FILE}"}
    assert ModelSpec.from_json(extra[f"extra/{SPEC_FILE}"], "test") == loaded.spec


@needs_torchscript
def test_nothing_of_this_machine_is_inside(path: Path) -> None:
    content = path.read_bytes()
    require_no_folders(content)
    assert b"a-name-to-look-for" not in content
    assert b"site-packages" not in content
    # Names so short that random weights may spell them are looked for beside the weights.
    written = {name: entry for name, entry in entries(path).items() if not name.startswith("constants/")}
    text = "\n".join([*written, *(entry.decode(errors="replace") for entry in written.values())])
    assert "def forward" in text
    for name in (getpass.getuser(), socket.gethostname()):
        assert not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text)


@needs_torchscript
def test_the_archive_is_sound(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert len(set(names)) == len(names)
    assert not any(name.endswith(".debug_pkl") for name in names)


@needs_torchscript
def test_saving_again_with_another_spec_changes_nothing_but_the_spec(
    artifact: TorchScriptArtifact, path: Path, loaded: Checkpoint, tmp_path: Path
) -> None:
    other = msgspec.structs.replace(loaded.spec, exporter={"format": "torchscript"})
    artifact.save(tmp_path / "other.torchscript.pt", other)
    first, second = entries(path), entries(tmp_path / "other.torchscript.pt")
    assert ModelSpec.from_json(second[f"extra/{SPEC_FILE}"], "test") == other
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} <= {
        f"extra/{SPEC_FILE}",
        ".data/serialization_id",
    }
    artifact.save(tmp_path / "again.torchscript.pt", loaded.spec)
    assert (tmp_path / "again.torchscript.pt").read_bytes() == path.read_bytes()


@needs_torchscript
def test_converting_again_writes_the_same_but_for_a_counter(path: Path, loaded: Checkpoint, tmp_path: Path) -> None:
    """PyTorch numbers the classes that a process has traced: so two exports of one process differ in that."""
    again = tmp_path / "again.torchscript.pt"
    convert_to_torchscript(source_of(loaded)).save(again, loaded.spec)
    ours, theirs = entries(path), entries(again)
    for archive in (ours, theirs):
        assert archive.pop("data.pkl")  # writes the length of the name before the name
        assert archive.pop(".data/serialization_id")  # a checksum of all the others
    assert dict(map(without_counter, *zip(*ours.items(), strict=True))) == dict(
        map(without_counter, *zip(*theirs.items(), strict=True))
    )


@needs_torchscript
def test_converting_prints_nothing_and_leaves_the_network_as_it_was(
    loaded: Checkpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    module = loaded.build()
    generator = torch.get_rng_state()
    convert_to_torchscript(source_of(loaded, module=module))
    assert tuple(capfd.readouterr()) == ("", "")
    assert not module.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.requires_grad for parameter in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.model[name])


@pytest.mark.parametrize("version", [(3, 14, 0), (3, 15, 1)])
def test_a_python_without_torchscript_is_refused(
    loaded: Checkpoint, version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = loaded.build()
    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"3\.14.*--format onnx"):
        patch.setattr(sys, "version_info", version)
        convert_to_torchscript(source_of(loaded, module=module))
