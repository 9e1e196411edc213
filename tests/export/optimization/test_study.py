from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cifarx_export.optimization.candidates import Candidate
from cifarx_export.optimization.study import DOCUMENT, FINE_TUNED, Study, StudyIdentity, installed_version
from cifarx_serve.progress import silent
from cifarx_train.checkpoints.checkpoint import file_sha256
from tests.support.optimization import measurement, proved

IDENTITY = StudyIdentity(checkpoint="a", spec="b", data="c", cpu="a CPU", threads=2, version="1")
ONNX, INT8 = Candidate("onnx", "fp32"), Candidate("onnx", "int8")


def _write(folder: Path, **versions: str) -> None:
    study = Study(folder, IDENTITY, silent)
    for one in (ONNX, INT8):
        file = folder / f"net.{one.precision}.onnx"
        file.write_text(one.name)
        study.record(proved(one.name, 1.0, file=file.name, sha256=file_sha256(file), versions=versions))


def _open(folder: Path, identity: StudyIdentity = IDENTITY) -> tuple[Study, list[str]]:
    lines: list[str] = []
    return Study(folder, identity, lines.append), lines


def test_a_study_goes_on(tmp_path: Path) -> None:
    _write(tmp_path)
    study, lines = _open(tmp_path)
    found = study.get(ONNX)
    assert found is not None
    assert study.path(found) == tmp_path / "net.fp32.onnx"
    assert len(lines) == 1
    assert "2 candidates are there" in lines[0]
    assert study.get(Candidate("pt2", "fp32")) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": "x"}, "another checkpoint"),
        ({"spec": "x"}, "other statements about the network"),
        ({"data": "x"}, "other images"),
        ({"cpu": "another CPU"}, "another machine (a CPU, 2 threads)"),
        ({"threads": 1}, "another machine"),
        ({"version": "2"}, "another version of cifarx (1)"),
    ],
)
def test_a_study_of_something_else_starts_anew_with_a_word(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    _write(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    study, lines = _open(tmp_path, msgspec.structs.replace(IDENTITY, **changes))
    assert study.get(ONNX) is None
    assert len(lines) == 1
    assert words in lines[0]
    assert "starting anew" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_that_is_missing_or_has_changed_is_made_again(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "net.fp32.onnx").unlink()
    (tmp_path / "net.int8.onnx").write_text("something else")
    study, lines = _open(tmp_path)
    assert study.get(ONNX) is None
    assert study.get(INT8) is None
    assert "net.fp32.onnx is missing" in lines[0]
    assert "net.int8.onnx has changed" in lines[1]


def test_a_result_of_another_version_of_its_libraries_is_not_used(tmp_path: Path) -> None:
    current = installed_version("numpy")
    assert current is not None
    _write(tmp_path, numpy=current)
    assert _open(tmp_path)[0].get(ONNX) is not None
    _write(tmp_path, numpy="0.1")
    study, lines = _open(tmp_path)
    assert study.get(ONNX) is None
    assert f"it was made with numpy 0.1, and {current} is installed" in lines[0]


def test_machine_code_of_an_earlier_run_is_compiled_again_rather_than_opened(tmp_path: Path) -> None:
    (tmp_path / "net.aoti.pt2").write_text("code")
    result = proved("aotinductor fp32", file="net.aoti.pt2", sha256=file_sha256(tmp_path / "net.aoti.pt2"))
    Study(tmp_path, IDENTITY, silent).record(result)
    study, lines = _open(tmp_path)
    assert study.get(result.candidate) is None
    assert "only the run that compiled its code may open it" in lines[0]
    study.record(msgspec.structs.replace(result, measurement=measurement()))
    assert _open(tmp_path)[0].get(result.candidate) is not None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"schema_version": 1}'])
def test_a_damaged_document_starts_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DOCUMENT).write_bytes(content)
    study, lines = _open(tmp_path)
    assert study.get(ONNX) is None
    assert "is not a study" in lines[0]
    study.record(proved("onnx fp32", 1.0, file=None))
    assert _open(tmp_path)[0].get(ONNX) is not None


def test_a_document_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    outside.write_text("precious")
    folder = tmp_path / "net.optimize"
    folder.mkdir()
    Study(folder, IDENTITY, silent).record(proved("onnx fp32", 1.0, file="../outside.onnx"))
    _open(folder, msgspec.structs.replace(IDENTITY, checkpoint="x"))
    assert outside.read_text() == "precious"


def _write_pruned(folder: Path, share: float) -> Path:
    study = Study(folder, IDENTITY, silent)
    weights = study.weights_file(Candidate("onnx", "fp32", pruned=share))
    assert weights is not None
    weights.write_text(f"weights without {share}")
    file = folder / "net.pruned.onnx"
    file.write_text("pruned")
    hashes = {"sha256": file_sha256(file), "weights_sha256": file_sha256(weights)}
    study.record(proved("onnx fp32", 1.0, pruned=share, file=file.name, **hashes))
    return weights


def test_each_share_of_pruned_channels_is_kept_apart(tmp_path: Path) -> None:
    _write(tmp_path)
    first, second = _write_pruned(tmp_path, 0.3), _write_pruned(tmp_path, 0.5)
    assert (first.name, second.name) == ("pruned30.pth", "pruned50.pth")
    study, _ = _open(tmp_path)
    assert all(study.get(one) for one in (ONNX, INT8, ONNX._replace(pruned=0.3), ONNX._replace(pruned=0.5)))
    assert study.get(ONNX._replace(pruned=0.4)) is None


@pytest.mark.parametrize(("damage", "words"), [(Path.unlink, "is missing"), (Path.touch, None)])
def test_a_pruned_candidate_needs_the_weights_that_it_was_made_from(
    tmp_path: Path, damage: Callable[[Path], None], words: str | None
) -> None:
    damage(_write_pruned(tmp_path, 0.3))
    study, lines = _open(tmp_path)
    assert (study.get(ONNX._replace(pruned=0.3)) is None) == (words is not None)
    assert words is None or f"pruned30.pth {words}" in lines[0]


def test_other_weights_than_those_of_the_candidate_are_noticed(tmp_path: Path) -> None:
    _write_pruned(tmp_path, 0.3).write_text("other weights")
    study, lines = _open(tmp_path)
    assert study.get(ONNX._replace(pruned=0.3)) is None
    assert "pruned30.pth has changed" in lines[0]


@pytest.mark.parametrize("content", ["nothing", None])
def test_weights_that_no_document_describes_are_removed(tmp_path: Path, content: str | None) -> None:
    weights = [_write_pruned(tmp_path, 0.3), tmp_path / FINE_TUNED]
    weights[1].touch()
    if content is None:
        (tmp_path / DOCUMENT).unlink()
    else:
        (tmp_path / DOCUMENT).write_text(content)
    _open(tmp_path)
    assert not any(path.exists() for path in weights)


def test_the_weights_of_another_checkpoint_are_removed(tmp_path: Path) -> None:
    weights = _write_pruned(tmp_path, 0.3)
    _open(tmp_path, msgspec.structs.replace(IDENTITY, checkpoint="x"))
    assert not weights.exists()
