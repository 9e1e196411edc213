"""`.pt2` archives: what is inside, what is not, and the same every time."""

import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from cifarx_export.formats.exported_program import ExportedProgramArtifact, convert_to_exported_program
from cifarx_export.formats.registry import NO_OPTIONS, Source
from cifarx_serve.backends.torch.exported_program import ExportedProgramBackend
from cifarx_serve.devices import Device
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec, Precision
from tests.support.machine_traces import require_no_folders

CPU = Device("cpu")
SPEC = ModelSpec(model="small", class_names=tuple("abcde"), input=InputSpec(height=8, width=6))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(192, 5)
    ).eval()


def source(precision: Precision = "fp32") -> Source:
    def no_images(count: int) -> np.ndarray:
        raise AssertionError(f"asked for {count} training images")

    return Source(network(), msgspec.structs.replace(SPEC, precision=precision), NO_OPTIONS, no_images, silent, {})


@pytest.fixture(scope="module")
def artifact() -> ExportedProgramArtifact:
    return convert_to_exported_program(source())


@pytest.fixture(scope="module")
def path(artifact: ExportedProgramArtifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "a-name-to-look-for.pt2"
    artifact.save(path, SPEC)
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_it_answers_as_the_network_at_any_batch(
    precision: Precision, tolerance: float, size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    taken = source(precision)
    convert_to_exported_program(taken).save(tmp_path / "x.pt2", taken.spec)
    batch = np.random.default_rng(size).random((size, 3, 8, 6), np.float32)
    with ExportedProgramBackend(tmp_path / "x.pt2", CPU) as backend:
        logits = backend.run(batch)
        assert backend.spec == taken.spec
    with torch.no_grad():
        expected = network()(torch.from_numpy(batch)).numpy()
    assert (logits.dtype, logits.shape) == (np.float32, (size, 5))
    np.testing.assert_allclose(logits, expected, rtol=tolerance, atol=tolerance)
    assert tuple(capfd.readouterr()) == ("", "")


def test_half_precision_halves_the_weights(path: Path, tmp_path: Path) -> None:
    taken = source("fp16")
    convert_to_exported_program(taken).save(tmp_path / "half.pt2", taken.spec)

    def weights(file: Path) -> int:
        with zipfile.ZipFile(file) as archive:
            return sum(entry.file_size for entry in archive.infolist() if "/weight_" in entry.filename)

    assert weights(tmp_path / "half.pt2") == pytest.approx(weights(path) / 2, rel=0.05)


def test_nothing_of_this_machine_is_inside(path: Path) -> None:
    content = path.read_bytes()
    require_no_folders(content)
    for trace in (b"a-name-to-look-for", b"site-packages", b"stack_trace", b".py", b"torch.nn.modules"):
        assert trace not in content


def test_there_is_nothing_to_unpickle(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo("archive/data/sample_inputs/model.pt").file_size == 0
        assert not any(b'pickle": true' in archive.read(name) for name in archive.namelist())


def test_saving_again_with_another_spec_changes_nothing_but_the_spec(
    artifact: ExportedProgramArtifact, path: Path, tmp_path: Path
) -> None:
    other = msgspec.structs.replace(SPEC, exporter={"format": "exported_program"})
    artifact.save(tmp_path / "other.pt2", other)
    with zipfile.ZipFile(path) as first, zipfile.ZipFile(tmp_path / "other.pt2") as second:
        assert first.namelist() == second.namelist()
        changed = {name for name in first.namelist() if first.read(name) != second.read(name)}
    assert changed <= {"archive/extra/cifarx_spec.json", "archive/.data/serialization_id"}
    assert ExportedProgramBackend.read_spec(tmp_path / "other.pt2") == other


def test_the_same_bytes_every_time(path: Path, tmp_path: Path) -> None:
    convert_to_exported_program(source()).save(tmp_path / "again.pt2", SPEC)
    assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_same_bytes_in_another_process(path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.export.formats.test_exported_program import SPEC, convert_to_exported_program, source\n"
        "convert_to_exported_program(source()).save(Path(sys.argv[1]), SPEC)"
    )
    again, root = tmp_path / "again.pt2", Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code, str(again), str(root)], check=True)
    assert again.read_bytes() == path.read_bytes()
