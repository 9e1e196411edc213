"""TorchScript archives: their content, and that they are reproducible as far as PyTorch allows."""

import dataclasses
import getpass
import inspect
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
from torch.jit._trace import TracerWarning

from cifarx_export.formats.torchscript import TorchScriptArtifact, convert_to_torchscript, tracer_notes
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from tests.support.conversion import conversion_source
from tests.support.local_paths import assert_no_local_paths

needs_torchscript = pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="PyTorch does not support TorchScript on this version of Python"
)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def artifact(loaded: Checkpoint) -> TorchScriptArtifact:
    [artifact] = convert_to_torchscript(conversion_source(loaded))
    return artifact


@pytest.fixture(scope="module")
def path(artifact: TorchScriptArtifact, loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchscript") / "a-name-to-search-for.torchscript.pt"
    artifact.save(path, loaded.spec)
    return path


def load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        return torch.jit.load(str(path))


def entries(path: Path) -> dict[str, bytes]:
    """Return the files in the archive by name, without the root folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def without_counter(name: str, content: bytes) -> tuple[str, bytes]:
    """Remove the number that PyTorch appends to the name of each class that a process traces."""
    return re.sub(r"_mangle_\d+", "", name), re.sub(rb"_mangle_\d+", b"", content)


@needs_torchscript
@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_logits_match_the_network_at_any_batch_size(path: Path, loaded: Checkpoint, size: int) -> None:
    inputs = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
    module = load(path)
    with torch.inference_mode():
        logits, expected = module(inputs), loaded.build()(inputs)
    assert (logits.dtype, tuple(logits.shape)) == (torch.float32, (size, 10))
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


@needs_torchscript
@pytest.mark.parametrize("size", [1, 3, 64])
def test_fp16_logits_are_close_to_the_network(loaded: Checkpoint, tmp_path: Path, size: int) -> None:
    source = conversion_source(loaded, "fp16")
    path = tmp_path / "half.torchscript.pt"
    convert_to_torchscript(source)[0].save(path, source.spec)
    inputs = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
    module = load(path)
    with torch.inference_mode():
        logits, expected = module(inputs), loaded.build()(inputs)
    assert (logits.dtype, tuple(logits.shape)) == (torch.float32, (size, 10))
    assert not torch.equal(logits, expected)
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=1e-2, atol=1e-2)


@needs_torchscript
def test_fp16_halves_the_file_size(path: Path, loaded: Checkpoint, tmp_path: Path) -> None:
    source = conversion_source(loaded, "fp16")
    convert_to_torchscript(source)[0].save(tmp_path / "half.torchscript.pt", source.spec)
    weights = sum(value.nbytes for value in loaded.weights.values())
    saved = path.stat().st_size - (tmp_path / "half.torchscript.pt").stat().st_size
    assert saved == pytest.approx(weights / 2, rel=0.02)


@needs_torchscript
def test_the_weights_are_frozen(path: Path) -> None:
    module = load(path)
    assert list(module.parameters()) == []
    assert list(module.buffers()) == []
    assert module.state_dict() == {}


class Patches(torch.nn.Module):
    """Divides images into patches, as a vision transformer does, and returns ten of their pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        n, _, height, width = images.shape
        patches = images[:, 0].reshape(n, height // 4, 4, width // 4, 4).transpose(2, 3)
        return patches.reshape(n, (height // 4) * (width // 4) * 16)[:, :10]


@needs_torchscript
@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_shapes_are_computed_without_tensor_constants(loaded: Checkpoint, tmp_path: Path, size: int) -> None:
    """On a GPU, these would be on the GPU, and the host would wait for it."""
    [artifact] = convert_to_torchscript(conversion_source(loaded, module=Patches()))
    artifact.save(tmp_path / "patches.pt", loaded.spec)
    module = load(tmp_path / "patches.pt")
    constants = [node for node in module.graph.findAllNodes("prim::Constant") if node.hasAttribute("value")]
    assert [node for node in constants if node.kindOf("value") == "t"] == []
    assert module.graph.findAllNodes("aten::floor_divide")
    images = torch.rand(size, 3, 32, 32)
    assert torch.equal(module(images), Patches()(images))


@needs_torchscript
def test_convolutions_do_not_allow_tf32(good_torchscript: Path) -> None:
    """Tracing writes the setting of the process into every convolution, where a GPU would use it."""
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
def test_the_file_contains_nothing_about_this_machine(path: Path) -> None:
    content = path.read_bytes()
    assert_no_local_paths(content)
    assert b"a-name-to-search-for" not in content
    assert b"site-packages" not in content
    # Weights are excluded, because they can spell a short name by chance.
    texts = {name: entry for name, entry in entries(path).items() if not name.startswith("constants/")}
    text = "\n".join([*texts, *(entry.decode(errors="replace") for entry in texts.values())])
    assert "def forward" in text
    for name in (getpass.getuser(), socket.gethostname()):
        assert not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text)


@needs_torchscript
def test_the_archive_is_valid_and_has_no_debug_tables(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert len(set(names)) == len(names)
    assert not any(name.endswith(".debug_pkl") for name in names)


@needs_torchscript
def test_saving_with_another_spec_changes_only_the_spec(
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
def test_converting_again_gives_the_same_content_except_for_a_counter(
    path: Path, loaded: Checkpoint, tmp_path: Path
) -> None:
    """PyTorch numbers the classes that a process traces, so two exports of one process differ in the numbers."""
    again = tmp_path / "again.torchscript.pt"
    convert_to_torchscript(conversion_source(loaded))[0].save(again, loaded.spec)
    first, second = entries(path), entries(again)
    for archive in (first, second):
        assert archive.pop("data.pkl")  # holds the lengths of the names
        assert archive.pop(".data/serialization_id")  # a checksum of the other files
    assert dict(map(without_counter, *zip(*first.items(), strict=True))) == dict(
        map(without_counter, *zip(*second.items(), strict=True))
    )


@needs_torchscript
def test_converting_prints_nothing_and_does_not_modify_the_network(
    loaded: Checkpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    module = loaded.build()
    generator = torch.get_rng_state()
    convert_to_torchscript(conversion_source(loaded, module=module))
    assert tuple(capfd.readouterr()) == ("", "")
    assert not module.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.requires_grad for parameter in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.weights[name])


class FollowsValues(torch.nn.Module):
    """A network with control flow that the tracer does not follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.mean() > 0.5:
            images = 1 - images
        for _ in range(int(images.amax())):
            images = images * 2
        return images.mean((2, 3)).repeat(1, 4)[:, :10]


@needs_torchscript
def test_a_note_names_each_line_that_the_tracer_does_not_follow(loaded: Checkpoint) -> None:
    lines: list[str] = []
    source = conversion_source(loaded, module=FollowsValues().eval())
    convert_to_torchscript(dataclasses.replace(source, progress=lines.append))
    _, first = inspect.getsourcelines(FollowsValues)
    assert lines == [
        f"note: {Path(__file__).name} line {first + 4}: TorchScript keeps the branch that was taken for the traced "
        "images",
        f"note: {Path(__file__).name} line {first + 6}: TorchScript keeps the number that was computed for the traced "
        "images",
    ]


@needs_torchscript
def test_lines_of_packages_have_no_note(loaded: Checkpoint) -> None:
    """The tracer warns about lines of PyTorch's LSTM, which compare sizes."""

    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(96, 10, batch_first=True)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.lstm(images.permute(0, 2, 1, 3).flatten(2))[0]
            return outputs[:, -1]

    lines: list[str] = []
    source = conversion_source(loaded, module=Recurrent().eval())
    convert_to_torchscript(dataclasses.replace(source, progress=lines.append))
    assert lines == []


def test_many_notes_are_counted() -> None:
    warned = [
        warnings.WarningMessage(
            TracerWarning(f"Iterating over a tensor might cause {line}"), TracerWarning, "m.py", line
        )
        for line in range(8)
    ]
    notes = tracer_notes(warned)
    assert notes[0] == "note: m.py line 0: TorchScript keeps the number of steps that was taken for the traced images"
    assert notes[5:] == ["note: 3 more lines like these"]


@pytest.mark.parametrize("version", [(3, 14, 0), (3, 15, 1)])
def test_a_python_version_without_torchscript_is_refused(
    loaded: Checkpoint, version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = loaded.build()
    with (
        monkeypatch.context() as patch,
        pytest.raises(UsageError, match=r"^TorchScript is not supported on Python 3\.14 and later: use --format onnx$"),
    ):
        patch.setattr(sys, "version_info", version)
        convert_to_torchscript(conversion_source(loaded, module=module))
