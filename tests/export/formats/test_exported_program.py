"""Exported programs: the content of the archive, and that it is reproducible."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from cifarx_export.formats.exported_program import ExportedProgramArtifact, convert_to_exported_program
from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource
from cifarx_serve.backends.torch.exported_program import ExportedProgramBackend
from cifarx_serve.devices import Device
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec, Precision
from tests.support.local_paths import assert_no_local_paths

CPU = Device("cpu")
SPEC = ModelSpec(model="small", class_names=tuple("abcde"), input=InputSpec(height=8, width=6))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(192, 5)
    ).eval()


def source(precision: Precision = "fp32", build: Callable[[], nn.Module] = network) -> ConversionSource:
    def no_images(count: int) -> np.ndarray:
        raise AssertionError(f"the converter loaded {count} training images")

    spec = msgspec.structs.replace(SPEC, precision=precision)
    return ConversionSource(build, spec, NO_OPTIONS, no_images, silent)


@pytest.fixture(scope="module")
def artifact() -> ExportedProgramArtifact:
    [artifact] = convert_to_exported_program(source())
    return artifact


@pytest.fixture(scope="module")
def path(artifact: ExportedProgramArtifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "a-name-to-search-for.pt2"
    artifact.save(path, SPEC)
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_logits_match_the_network_at_any_batch_size(
    precision: Precision, tolerance: float, size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    converted = source(precision)
    convert_to_exported_program(converted)[0].save(tmp_path / "x.pt2", converted.spec)
    batch = np.random.default_rng(size).random((size, 3, 8, 6), np.float32)
    with ExportedProgramBackend(tmp_path / "x.pt2", CPU) as backend:
        logits = backend.run(batch)
        assert backend.spec == converted.spec
    with torch.no_grad():
        expected = network()(torch.from_numpy(batch)).numpy()
    assert (logits.dtype, logits.shape) == (np.float32, (size, 5))
    np.testing.assert_allclose(logits, expected, rtol=tolerance, atol=tolerance)
    assert tuple(capfd.readouterr()) == ("", "")


class Viewing(nn.Module):
    """Views a tensor that is contiguous on the CPU, and may not be on another device."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 2, 3, 1).permute(0, 3, 1, 2).contiguous().view(images.shape[0], -1)[:, :5]


def test_no_operator_requires_the_strides_of_the_cpu(tmp_path: Path) -> None:
    [artifact] = convert_to_exported_program(source(build=Viewing))
    artifact.save(tmp_path / "x.pt2", SPEC)
    program = torch.export.load(tmp_path / "x.pt2")
    operators = {node.target for node in program.graph.nodes}
    assert torch.ops.aten.reshape.default in operators
    assert torch.ops.aten.view.default not in operators
    images = torch.rand(3, 3, 8, 6)
    assert torch.equal(program.module()(images), Viewing()(images))


def test_fp16_halves_the_size_of_the_weights(path: Path, tmp_path: Path) -> None:
    converted = source("fp16")
    convert_to_exported_program(converted)[0].save(tmp_path / "fp16.pt2", converted.spec)

    def weight_bytes(file: Path) -> int:
        with zipfile.ZipFile(file) as archive:
            return sum(entry.file_size for entry in archive.infolist() if "/weight_" in entry.filename)

    assert weight_bytes(tmp_path / "fp16.pt2") == pytest.approx(weight_bytes(path) / 2, rel=0.05)


def test_the_file_contains_nothing_about_this_machine(path: Path) -> None:
    content = path.read_bytes()
    assert_no_local_paths(content)
    for trace in (b"a-name-to-search-for", b"site-packages", b"stack_trace", b".py", b"torch.nn.modules"):
        assert trace not in content


def test_the_archive_contains_no_pickles(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo("archive/data/sample_inputs/model.pt").file_size == 0
        assert not any(b'pickle": true' in archive.read(name) for name in archive.namelist())


def test_saving_with_another_spec_changes_only_the_spec(
    artifact: ExportedProgramArtifact, path: Path, tmp_path: Path
) -> None:
    other = msgspec.structs.replace(SPEC, exporter={"format": "exported_program"})
    artifact.save(tmp_path / "other.pt2", other)
    with zipfile.ZipFile(path) as first, zipfile.ZipFile(tmp_path / "other.pt2") as second:
        assert first.namelist() == second.namelist()
        changed = {name for name in first.namelist() if first.read(name) != second.read(name)}
    assert changed <= {"archive/extra/cifarx_spec.json", "archive/.data/serialization_id"}
    assert ExportedProgramBackend.read_spec(tmp_path / "other.pt2") == other


def test_converting_again_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    convert_to_exported_program(source())[0].save(tmp_path / "again.pt2", SPEC)
    assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.export.formats.test_exported_program import SPEC, convert_to_exported_program, source\n"
        "convert_to_exported_program(source())[0].save(Path(sys.argv[1]), SPEC)"
    )
    again, root = tmp_path / "again.pt2", Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code, str(again), str(root)], check=True)
    assert again.read_bytes() == path.read_bytes()
