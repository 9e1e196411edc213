"""Export: an artifact has its name only once it is proved, and a failure leaves what was there before."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
import pytest

from cifarx_export.export import Exported, export
from cifarx_export.formats.registry import ExportOptions, export_format
from cifarx_export.parity.report import ParityReport
from cifarx_serve.backends.registry import find_model, open_backend, read_spec
from cifarx_serve.errors import CifarxError, DataError, ModelFileError, OutputError, UsageError
from cifarx_serve.spec import ParitySummary
from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from tests.support.conversion_source import source_of

FORMATS = ["onnx", "torchscript"]

EXPORT = """
import sys
from cifarx_export.export import export
export(sys.argv[1], [sys.argv[2]], data=sys.argv[3])
"""


@pytest.fixture(scope="module")
def made(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Exported]:
    """Every format of a checkpoint that is alone in its folder; a format asked for twice is made once."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(checkpoint, folder / "lzh_9.pth")
    return export(folder / "lzh_9.pth", [*FORMATS, "onnx"], data=str(pictures))


@pytest.fixture
def alone(checkpoint: Path) -> Path:
    """A checkpoint alone in the current folder, by a relative path."""
    shutil.copy(checkpoint, "lzh_9.pth")
    return Path("lzh_9.pth")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    document: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return document


def failures(document: dict[str, Any]) -> set[str]:
    return {check["name"] for check in document["checks"] if not check["passed"]}


def test_artifacts_and_reports_lie_beside_the_checkpoint_and_nothing_else(made: list[Exported]) -> None:
    folder = made[0].path.parent
    assert [artifact.path.name for artifact in made] == ["lzh_9.onnx", "lzh_9.torchscript.pt"]
    assert {path.name for path in folder.iterdir()} == {
        "lzh_9.pth",
        "lzh_9.onnx",
        "lzh_9.onnx.parity.json",
        "lzh_9.torchscript.pt",
        "lzh_9.torchscript.pt.parity.json",
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_the_report_is_of_the_file_beside_it(made: list[Exported], kind: str) -> None:
    artifact = made[FORMATS.index(kind)]
    document = strict_json(artifact.report_path)
    assert artifact.report_path.name == artifact.path.name + ".parity.json"
    assert msgspec.convert(document, ParityReport) == artifact.report
    assert (document["artifact"], document["format"]) == (artifact.path.name, kind)
    assert document["artifact_sha256"] == sha256(artifact.path)
    assert document["checkpoint_sha256"] == sha256(artifact.path.with_name(document["checkpoint"]))
    assert failures(document) == set()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_artifact_says_the_same_of_itself(made: list[Exported], kind: str) -> None:
    artifact = made[FORMATS.index(kind)]
    checkpoint = artifact.path.with_name("lzh_9.pth")
    spec = read_spec(artifact.path)
    assert spec.parity == msgspec.convert(strict_json(artifact.report_path)["summary"], ParitySummary)
    assert spec.parity is not None
    assert spec.parity.passed
    assert spec.checkpoint_sha256 == sha256(checkpoint)
    assert spec.exporter is not None
    assert spec.exporter["format"] == kind
    assert spec.exporter["torch"]
    trained = load_checkpoint(checkpoint)
    assert spec.weights_sha256 == weights_sha256(trained.model)
    told = {"checkpoint_sha256", "weights_sha256", "exporter", "parity", "minimum_onnxruntime"}
    assert msgspec.structs.replace(spec, **dict.fromkeys(told)) == trained.spec


@pytest.mark.parametrize("kind", FORMATS)
def test_the_sealed_artifact_answers_as_the_proved_one(made: list[Exported], kind: str) -> None:
    artifact = made[FORMATS.index(kind)]
    loaded = load_checkpoint(artifact.path.with_name("lzh_9.pth"))
    unsealed = Path(f"unsealed{export_format(kind).suffix}")
    export_format(kind).convert(source_of(loaded)).save(unsealed, loaded.spec)
    inputs = np.random.default_rng(0).random((64, 3, 32, 32), dtype=np.float32)
    answers = []
    for path in (artifact.path, unsealed):
        with open_backend(path, device="cpu") as backend:
            answers.append(backend.run(inputs))
    assert np.array_equal(*answers)


def test_exporting_again_elsewhere_writes_the_same_bytes_and_prints_nothing(
    made: list[Exported], pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = made[0].path.with_name("lzh_9.pth")
    shutil.copy(checkpoint, "best.of.run.pth")
    told: list[str] = []
    again = export("best.of.run.pth", data=str(pictures), out="not/yet/there", progress=told.append)[0]
    assert again.path == Path("not/yet/there/best.of.run.onnx")
    assert again.path.read_bytes() == made[0].path.read_bytes()
    assert set(contents(Path.cwd())) == {
        "best.of.run.pth",
        "not/yet/there/best.of.run.onnx",
        "not/yet/there/best.of.run.onnx.parity.json",
    }
    assert tuple(capfd.readouterr()) == ("", "")
    assert any("1010 images of pictures" in line for line in told)


def test_a_failed_proof_keeps_the_last_good_artifact_and_its_report(copied: Path, pictures: Path) -> None:
    before = contents(copied)
    failed = export(copied / "lzh_0.pth", data=str(pictures), atol=0.0, rtol=0.0)[0]
    assert not failed.report.summary.passed
    assert failed.report_path == copied / "lzh_0.onnx.failed.parity.json"
    after = contents(copied)
    document = json.loads(after.pop(failed.report_path.name))
    assert after == before
    assert failures(document) == {"tolerance"}
    assert document["artifact_sha256"] is None
    assert (document["summary"]["passed"], document["summary"]["atol"]) == (False, 0.0)


def test_a_success_takes_the_failed_report_away_and_replaces_the_old_artifact(copied: Path, pictures: Path) -> None:
    before = contents(copied)
    (copied / "lzh_0.onnx.failed.parity.json").write_text("{}")
    artifact = export(copied / "lzh_0.pth", data=str(pictures), options=ExportOptions(opset=20))[0]
    assert contents(copied).keys() == before.keys()
    assert artifact.path.read_bytes() != before["lzh_0.onnx"]
    assert [entry.version for entry in onnx.load(artifact.path).opset_import] == [20]
    assert strict_json(artifact.report_path)["artifact_sha256"] == sha256(artifact.path)


def test_what_never_passed_never_has_its_name(alone: Path, pictures: Path) -> None:
    """NaN on both sides is the same answer, and no proof."""
    loaded = load_checkpoint(alone)
    loaded.model["model.8.bias"][3] = float("nan")
    save_checkpoint(alone, loaded)
    failed = export(alone, data=str(pictures), atol=1e9, rtol=1e9)[0]
    assert not failed.report.summary.passed
    assert "finite" in failures(strict_json(failed.report_path))
    assert {path.name for path in Path.cwd().iterdir()} == {"lzh_9.pth", "lzh_9.onnx.failed.parity.json"}


# What is refused, and leaves nothing.


class Refused(NamedTuple):
    error: type[CifarxError]
    text: str
    arguments: dict[str, Any]


REFUSED = {
    "a misspelt format": Refused(UsageError, "unknown format 'onxx': did you mean 'onnx'", {"formats": ["onxx"]}),
    "one misspelt format of two": Refused(UsageError, "did you mean 'torchscript'", {"formats": ["onnx", "torscript"]}),
    "an option of another format": Refused(
        UsageError, "torchscript has no --opset: leave it out", {"formats": FORMATS, "options": ExportOptions(opset=18)}
    ),
    "an opset that is not supported": Refused(
        UsageError, "opset 99 is not supported: give 18 to 23", {"options": ExportOptions(opset=99)}
    ),
    "a misspelt precision": Refused(UsageError, "unknown precision 'fp61'", {"precisions": ["fp61"]}),
    "a precision of another format": Refused(
        UsageError, "format torchscript has no int8", {"formats": FORMATS, "precisions": ["fp32", "int8"]}
    ),
    "calibration of what is not calibrated": Refused(
        UsageError, "fp32 is not calibrated", {"options": ExportOptions(calibration_images=9)}
    ),
    "a batch of none": Refused(UsageError, "batch size 0", {"batch": 0}),
    "a batch larger than the data": Refused(UsageError, "batch size 1011: give 1 to 1010", {"batch": 1011}),
    "a negative tolerance": Refused(UsageError, "rtol is -0.1", {"rtol": -0.1}),
    "a tolerance that is no number": Refused(UsageError, "atol is nan", {"atol": float("nan")}),
    "data that is not there": Refused(DataError, "no such data set nowhere", {"data": "nowhere"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing(name: str, alone: Path, pictures: Path) -> None:
    refused = REFUSED[name]
    before = contents(Path.cwd())
    with pytest.raises(refused.error, match=refused.text):
        export(alone, **{"data": str(pictures), **refused.arguments})
    assert contents(Path.cwd()) == before


def test_too_few_images_leave_nothing_not_even_the_folder(alone: Path, few_pictures: Path) -> None:
    with pytest.raises(DataError, match=r"few has 990 test images: a proof needs at least 1000"):
        export(alone, data=str(few_pictures), out="results")
    assert [path.name for path in Path.cwd().iterdir()] == ["lzh_9.pth"]


def test_what_is_no_checkpoint_is_refused(good_onnx: Path, checkpoint: Path, pictures: Path) -> None:
    Path("text.pth").write_text("weights")
    Path("half.pth").write_bytes(checkpoint.read_bytes()[:5000])
    shutil.copy(good_onnx, "onnx.pth")
    Path("folder.pth").mkdir()
    before = contents(Path.cwd())
    for name in ["text.pth", "half.pth", "onnx.pth", "folder.pth", "absent.pth"]:
        with pytest.raises(ModelFileError, match=name):
            export(name, data=str(pictures))
    assert contents(Path.cwd()) == before


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_place_that_cannot_be_written_is_an_output_error(out: str, alone: Path, pictures: Path) -> None:
    Path("file").write_text("mine")
    with pytest.raises(OutputError, match=f"cannot write {out}"):
        export(alone, data=str(pictures), out=out)
    assert set(contents(Path.cwd())) == {"file", "lzh_9.pth"}
    assert Path("file").read_text() == "mine"


_NO_ROOM = """
import resource, sys
from cifarx_export.export import export
from cifarx_serve.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    export(sys.argv[1], data=sys.argv[2], out=sys.argv[3])
except OutputError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX system's limits")
def test_a_conversion_without_room_for_its_files_is_an_output_error(alone: Path, pictures: Path) -> None:
    """A full disk of temporary files."""
    command = [sys.executable, "-c", _NO_ROOM, str(alone), str(pictures), "results"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("cannot write ")
    assert "free some space" in ran.stdout
    assert not any(Path("results").iterdir())


# Killed: with SIGKILL nothing can be tidied up, so what has its name must be whole at every moment.


def partial(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial*"))


def begun(folder: Path, _: Path) -> bool:
    return bool(partial(folder))


def written(folder: Path, _: Path) -> bool:
    with suppress(FileNotFoundError):  # it may be renamed between the two looks
        return any(path.stat().st_size > 0 for path in partial(folder))
    return False


def named(_: Path, target: Path) -> bool:
    return target.exists()


def kill_at(moment: Callable[[Path, Path], bool], checkpoint: Path, kind: str, data: Path) -> int:
    """Export in another process, its sets in another order, and kill it at a moment; how it ended."""
    folder = checkpoint.parent
    target = folder / f"{checkpoint.stem}{export_format(kind).suffix}"
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    with subprocess.Popen([sys.executable, "-c", EXPORT, checkpoint, kind, data], env=environment) as process:
        while process.poll() is None:
            if moment(folder, target):
                process.kill()
                break
            time.sleep(0.001)
        return process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_before_the_first_artifact_was_proved_there_is_none(alone: Path, pictures: Path) -> None:
    assert kill_at(written, alone.absolute(), "torchscript", pictures) == -signal.SIGKILL
    assert {path.name for path in Path.cwd().iterdir()} - {path.name for path in partial(Path.cwd())} == {alone.name}
    with pytest.raises(ModelFileError, match="no file for backend torchscript"):
        find_model(Path.cwd(), "torchscript")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_before_the_next_artifact_was_proved_the_last_one_stands(copied: Path, pictures: Path) -> None:
    before = contents(copied)
    assert kill_at(begun, copied / "lzh_0.pth", "torchscript", pictures) == -signal.SIGKILL
    left = {path.name for path in partial(copied)}
    assert {name: content for name, content in contents(copied).items() if name not in left} == before
    assert find_model(copied, "torchscript") == copied / "lzh_0.torchscript.pt"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_when_the_artifact_has_its_name_it_is_whole_and_the_same_as_anywhere(
    made: list[Exported], alone: Path, pictures: Path
) -> None:
    # The export may be quicker than the signal.
    assert kill_at(named, alone.absolute(), "onnx", pictures) in {-signal.SIGKILL, 0}
    assert Path("lzh_9.onnx").read_bytes() == made[0].path.read_bytes()
