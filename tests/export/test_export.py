"""Exports: an artifact gets its name only if it passes the parity check, and a failure changes no earlier file."""

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

from cifarx_export.checked_artifact import ExportResult
from cifarx_export.export import export
from cifarx_export.formats.int8 import search
from cifarx_export.formats.int8.search import MixedPrecision, Score, _Trial
from cifarx_export.formats.onnx import converter
from cifarx_export.formats.onnx.int8.search import QuantizationSearch
from cifarx_export.formats.registry import ExportOptions, get_format
from cifarx_export.parity.compare import ParityResult, check_parity
from cifarx_export.parity.report import ParityReport
from cifarx_serve.backends.registry import find_model, open_backend, read_spec
from cifarx_serve.errors import CifarxError, DataError, ModelFileError, OutputError, UsageError
from cifarx_serve.spec import ParitySummary
from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from tests.support.conversion import conversion_source

pytestmark = pytest.mark.usefixtures("remembered_outputs")

FORMATS = ["onnx", "torchscript"]

EXPORT = """
import sys
from cifarx_export.export import export
export(sys.argv[1], [sys.argv[2]], data=sys.argv[3])
"""


@pytest.fixture(scope="module")
def results(checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ExportResult]:
    """Export a checkpoint in an empty folder to all formats. A format requested twice is exported once."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copy(checkpoint, folder / "lzh_9.pth")
    return export(folder / "lzh_9.pth", [*FORMATS, "onnx"], data=str(image_folder))


@pytest.fixture
def lone_checkpoint(checkpoint: Path) -> Path:
    """Return the relative path of a checkpoint, the only file in the current folder."""
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


def test_only_artifacts_and_reports_are_written_next_to_the_checkpoint(results: list[ExportResult]) -> None:
    folder = results[0].path.parent
    assert [artifact.path.name for artifact in results] == ["lzh_9.onnx", "lzh_9.torchscript.pt"]
    assert {path.name for path in folder.iterdir()} == {
        "lzh_9.pth",
        "lzh_9.onnx",
        "lzh_9.onnx.parity.json",
        "lzh_9.torchscript.pt",
        "lzh_9.torchscript.pt.parity.json",
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_the_report_describes_its_artifact(results: list[ExportResult], kind: str) -> None:
    artifact = results[FORMATS.index(kind)]
    document = strict_json(artifact.report_path)
    assert artifact.report_path.name == artifact.path.name + ".parity.json"
    assert msgspec.convert(document, ParityReport) == artifact.report
    assert (document["artifact"], document["format"]) == (artifact.path.name, kind)
    assert document["artifact_sha256"] == sha256(artifact.path)
    assert document["checkpoint_sha256"] == sha256(artifact.path.with_name(document["checkpoint"]))
    assert failures(document) == set()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_spec_of_an_artifact_agrees_with_its_report(results: list[ExportResult], kind: str) -> None:
    artifact = results[FORMATS.index(kind)]
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
    assert spec.weights_sha256 == weights_sha256(trained.weights)
    added = {"checkpoint_sha256", "weights_sha256", "exporter", "parity", "minimum_onnxruntime"}
    assert msgspec.structs.replace(spec, **dict.fromkeys(added)) == trained.spec


@pytest.mark.parametrize("kind", FORMATS)
def test_embedding_the_parity_summary_does_not_change_the_outputs(results: list[ExportResult], kind: str) -> None:
    artifact = results[FORMATS.index(kind)]
    loaded = load_checkpoint(artifact.path.with_name("lzh_9.pth"))
    without_summary = Path(f"without_summary{get_format(kind).suffix}")
    next(iter(get_format(kind).convert(conversion_source(loaded)))).save(without_summary, loaded.spec)
    inputs = np.random.default_rng(0).random((64, 3, 32, 32), dtype=np.float32)
    logits = []
    for path in (artifact.path, without_summary):
        with open_backend(path, device="cpu") as backend:
            logits.append(backend.run(inputs))
    assert np.array_equal(logits[0], logits[1])


def test_exporting_again_writes_the_same_bytes_and_prints_nothing(
    results: list[ExportResult], image_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = results[0].path.with_name("lzh_9.pth")
    shutil.copy(checkpoint, "best.of.run.pth")
    lines: list[str] = []
    again = export("best.of.run.pth", data=str(image_folder), out="not/yet/there", progress=lines.append)[0]
    assert again.path == Path("not/yet/there/best.of.run.onnx")
    assert again.path.read_bytes() == results[0].path.read_bytes()
    assert set(contents(Path.cwd())) == {
        "best.of.run.pth",
        "not/yet/there/best.of.run.onnx",
        "not/yet/there/best.of.run.onnx.parity.json",
    }
    assert tuple(capfd.readouterr()) == ("", "")
    assert any("1,010 images of pictures" in line for line in lines)


def test_a_failed_parity_check_keeps_the_last_good_artifact_and_its_report(
    artifact_folder: Path, image_folder: Path
) -> None:
    before = contents(artifact_folder)
    failed = export(artifact_folder / "lzh_0.pth", data=str(image_folder), atol=0.0, rtol=0.0)[0]
    assert not failed.report.summary.passed
    assert failed.report_path == artifact_folder / "lzh_0.onnx.failed.parity.json"
    after = contents(artifact_folder)
    document = json.loads(after.pop(failed.report_path.name))
    assert after == before
    assert failures(document) == {"tolerance"}
    assert document["artifact_sha256"] is None
    assert (document["summary"]["passed"], document["summary"]["atol"]) == (False, 0.0)


def test_a_passed_parity_check_removes_the_failed_report_and_replaces_the_artifact(
    artifact_folder: Path, image_folder: Path
) -> None:
    before = contents(artifact_folder)
    (artifact_folder / "lzh_0.onnx.failed.parity.json").write_text("{}")
    artifact = export(artifact_folder / "lzh_0.pth", data=str(image_folder), options=ExportOptions(opset=20))[0]
    assert contents(artifact_folder).keys() == before.keys()
    assert artifact.path.read_bytes() != before["lzh_0.onnx"]
    assert [entry.version for entry in onnx.load(artifact.path).opset_import] == [20]
    assert strict_json(artifact.report_path)["artifact_sha256"] == sha256(artifact.path)


def test_an_artifact_that_never_passed_is_not_written(lone_checkpoint: Path, image_folder: Path) -> None:
    """NaN in both outputs is equal, but does not pass."""
    loaded = load_checkpoint(lone_checkpoint)
    loaded.weights["model.8.bias"][3] = float("nan")
    save_checkpoint(lone_checkpoint, loaded)
    failed = export(lone_checkpoint, data=str(image_folder), atol=1e9, rtol=1e9)[0]
    assert not failed.report.summary.passed
    assert "finite" in failures(strict_json(failed.report_path))
    assert {path.name for path in Path.cwd().iterdir()} == {"lzh_9.pth", "lzh_9.onnx.failed.parity.json"}


# Candidates of an int8 conversion. With a tolerance of 0, no int8 model can pass.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agreement", "candidates"),
    [
        pytest.param([0.5, 0.5, 0.5, 0.5, 0.5], 1, id="layers in fp32 do not help"),
        pytest.param([0.5, 0.98, 0.985, 0.9905, 0.9915], 2, id="the second candidate is the best"),
        pytest.param([0.5, 0.9905, 0.9925, 0.995, 0.999], 4, id="each candidate is better than the last"),
    ],
)
def test_int8_candidates_that_fail_are_not_converted_or_checked_again(
    agreement: list[float], candidates: int, lone_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the given agreement for 0 to 4 layers in fp32. The formats `onnx` and `triton` share the candidates."""
    monkeypatch.setattr(search, "CALIBRATION_IMAGES", 16)
    monkeypatch.setattr(search, "_HELD_OUT_IMAGES", (16, 16))

    def compare(_: QuantizationSearch, choice: MixedPrecision, *__: float) -> _Trial:
        measured = agreement[len(choice.fp32_layers)]
        return _Trial(Score(measured, 0.0), choice, measured)

    monkeypatch.setattr(QuantizationSearch, "_compare", compare)
    converted: list[bytes] = []
    monkeypatch.setattr(converter, "_check_model", lambda model, *_: converted.append(model.SerializeToString()))
    checked: list[str] = []

    def count_check(*arguments: Any) -> ParityResult:
        checked.append(arguments[1].spec.exporter["format"])
        return check_parity(*arguments)

    monkeypatch.setattr("cifarx_export.checked_artifact.check_parity", count_check)
    lines: list[str] = []
    results = export(
        lone_checkpoint, ["onnx", "triton"], ["int8"], data="builtin", atol=0.0, rtol=0.0, progress=lines.append
    )
    assert not any(result.report.summary.passed for result in results)
    assert checked == ["onnx"] * candidates + ["triton"] * candidates
    assert len(set(converted[:candidates])) == candidates
    assert converted[candidates:] == converted[:candidates]
    assert len([line for line in lines if "calibrating" in line]) == 1
    assert [line for line in lines if line.startswith("converting to onnx")] == [
        "converting to onnx int8",
        *(f"converting to onnx int8, attempt {number}" for number in range(2, candidates + 1)),
    ]


# Usage errors, which write no files.


class Refusal(NamedTuple):
    error: type[CifarxError]
    message: str
    arguments: dict[str, Any]


REFUSALS = {
    "a misspelled format": Refusal(UsageError, "unknown format 'onxx': did you mean 'onnx'", {"formats": ["onxx"]}),
    "one of two formats misspelled": Refusal(
        UsageError, "did you mean 'torchscript'", {"formats": ["onnx", "torscript"]}
    ),
    "an option that the format does not support": Refusal(
        UsageError,
        "format torchscript does not support --opset: leave it out, or export only onnx or openvino or triton",
        {"formats": FORMATS, "options": ExportOptions(opset=18)},
    ),
    "an unsupported opset": Refusal(
        UsageError, "opset 99 is not supported: give 11 to 23", {"options": ExportOptions(opset=99)}
    ),
    "a misspelled precision": Refusal(UsageError, "unknown precision 'fp61'", {"precisions": ["fp61"]}),
    "a precision that the format does not support": Refusal(
        UsageError,
        "format torchscript does not support int8: it supports fp32, fp16; "
        "onnx and aotinductor and openvino and executorch and litert and triton and web support int8",
        {"formats": FORMATS, "precisions": ["fp32", "int8"]},
    ),
    "calibration images for fp32": Refusal(
        UsageError,
        "fp32 needs no calibration: leave --calibration-images out, or add --precision int8",
        {"options": ExportOptions(calibration_images=9)},
    ),
    "a batch size of zero": Refusal(UsageError, "batch size 0 is out of range", {"batch_size": 0}),
    "a batch size above the number of images": Refusal(
        UsageError, "batch size 1011 is out of range: give 1 to 1010", {"batch_size": 1011}
    ),
    "a negative tolerance": Refusal(UsageError, "rtol is -0.1", {"rtol": -0.1}),
    "a tolerance of NaN": Refusal(UsageError, "atol is nan", {"atol": float("nan")}),
    "missing data": Refusal(DataError, "dataset nowhere does not exist", {"data": "nowhere"}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_export_writes_nothing(name: str, lone_checkpoint: Path, image_folder: Path) -> None:
    refusal = REFUSALS[name]
    before = contents(Path.cwd())
    with pytest.raises(refusal.error, match=refusal.message):
        export(lone_checkpoint, **{"data": str(image_folder), **refusal.arguments})
    assert contents(Path.cwd()) == before


def test_a_few_images_prove_little_and_the_file_says_so(lone_checkpoint: Path, few_images: Path) -> None:
    """int8 is calibrated on the images of the check, which is said too."""
    (result,) = export(lone_checkpoint, ["onnx"], ["fp32"], data=str(few_images))
    warning = "only 40 images: even an agreement of 100% proves only 92.78% with 95% confidence"
    assert result.report.summary.passed
    assert result.report.summary.warnings == read_spec(result.path).parity.warnings == (warning,)  # type: ignore[union-attr]
    (quantized,) = export(lone_checkpoint, ["onnx"], ["int8"], data=str(few_images))
    shared = "int8 was calibrated on images of this check: there are too few other ones"
    assert quantized.report.summary.warnings == (warning, shared)


def test_files_that_are_not_checkpoints_are_refused(good_onnx: Path, checkpoint: Path, image_folder: Path) -> None:
    Path("text.pth").write_text("weights")
    Path("half.pth").write_bytes(checkpoint.read_bytes()[:5000])
    shutil.copy(good_onnx, "onnx.pth")
    Path("folder.pth").mkdir()
    before = contents(Path.cwd())
    for name in ["text.pth", "half.pth", "absent.pth"]:
        with pytest.raises(ModelFileError, match=name):
            export(name, data=str(image_folder))
    with pytest.raises(UsageError, match=r"there is no config\.json in folder\.pth"):
        export("folder.pth", data=str(image_folder))
    with pytest.raises(UsageError, match=r"onnx\.pth is an ONNX file in fp32 already"):
        export("onnx.pth", data=str(image_folder))
    assert contents(Path.cwd()) == before


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_path_that_cannot_be_written_is_an_output_error(out: str, lone_checkpoint: Path, image_folder: Path) -> None:
    Path("file").write_text("mine")
    with pytest.raises(OutputError, match=f"cannot write {out}"):
        export(lone_checkpoint, data=str(image_folder), out=out)
    assert set(contents(Path.cwd())) == {"file", "lzh_9.pth"}
    assert Path("file").read_text() == "mine"


_NO_SPACE = """
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
@pytest.mark.skipif(sys.platform == "win32", reason="requires POSIX resource limits")
def test_no_space_for_temporary_files_is_an_output_error(lone_checkpoint: Path, image_folder: Path) -> None:
    """The conversion itself needs temporary files."""
    command = [sys.executable, "-c", _NO_SPACE, str(lone_checkpoint), str(image_folder), "results"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("cannot write ")
    assert "free some space" in ran.stdout
    assert not any(Path("results").iterdir())


# Exports ended by SIGKILL, after which nothing can clean up: a file with its final name must be complete at any time.


def partial_files(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial*"))


def writing_started(folder: Path, _: Path) -> bool:
    return bool(partial_files(folder))


def content_written(folder: Path, _: Path) -> bool:
    with suppress(FileNotFoundError):  # it can be renamed in between
        return any(path.stat().st_size > 0 for path in partial_files(folder))
    return False


def target_exists(_: Path, target: Path) -> bool:
    return target.exists()


def kill_at(moment: Callable[[Path, Path], bool], checkpoint: Path, kind: str, data: Path) -> int:
    """Export in another process, kill it at a moment, and return its exit status. Its sets are in another order."""
    folder = checkpoint.parent
    target = folder / f"{checkpoint.stem}{get_format(kind).suffix}"
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    with subprocess.Popen([sys.executable, "-c", EXPORT, checkpoint, kind, data], env=environment) as process:
        while process.poll() is None:
            if moment(folder, target):
                process.kill()
                break
            time.sleep(0.001)
        return process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killing_the_first_export_leaves_no_artifact(lone_checkpoint: Path, image_folder: Path) -> None:
    assert kill_at(content_written, lone_checkpoint.absolute(), "torchscript", image_folder) == -signal.SIGKILL
    assert {path.name for path in Path.cwd().iterdir()} - {path.name for path in partial_files(Path.cwd())} == {
        lone_checkpoint.name
    }
    with pytest.raises(ModelFileError, match="no file for backend torchscript"):
        find_model(Path.cwd(), "torchscript")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killing_a_later_export_keeps_the_last_artifact(artifact_folder: Path, image_folder: Path) -> None:
    before = contents(artifact_folder)
    assert kill_at(writing_started, artifact_folder / "lzh_0.pth", "torchscript", image_folder) == -signal.SIGKILL
    leftover = {path.name for path in partial_files(artifact_folder)}
    assert {name: content for name, content in contents(artifact_folder).items() if name not in leftover} == before
    assert find_model(artifact_folder, "torchscript") == artifact_folder / "lzh_0.torchscript.pt"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_an_artifact_with_its_final_name_is_complete(
    results: list[ExportResult], lone_checkpoint: Path, image_folder: Path
) -> None:
    # The export can end before the signal arrives.
    assert kill_at(target_exists, lone_checkpoint.absolute(), "onnx", image_folder) in {-signal.SIGKILL, 0}
    assert Path("lzh_9.onnx").read_bytes() == results[0].path.read_bytes()
