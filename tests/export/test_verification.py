"""Verify: an artifact against a checkpoint, on the data it was trained on and on any other."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest

from cifarx_export.parity_report import ParityReport
from cifarx_export.verification import verify
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.errors import CifarxError, DataError, ModelFileError, SpecError, UsageError


def failed(report: ParityReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_good_artifact_holds_on_the_data_of_its_training(good_onnx: Path, checkpoint: Path) -> None:
    before = contents(checkpoint.parent)
    report = verify(good_onnx, checkpoint)
    training = read_spec(checkpoint).training
    assert training is not None
    assert failed(report) == set()
    assert report.summary.passed
    assert (report.artifact, report.artifact_sha256) == (good_onnx.name, sha256(good_onnx))
    assert (report.checkpoint, report.checkpoint_sha256) == (checkpoint.name, sha256(checkpoint))
    assert (report.format, report.precision) == ("onnx", "fp32")
    assert report.summary.data_fingerprint == training.data.test_fingerprint
    # PyTorch and NumPy may part ways on an image or two whose best logits are equal.
    assert report.summary.reference_accuracy == pytest.approx(training.test_accuracy, abs=1.1e-3)
    assert report.summary.accuracy == report.summary.reference_accuracy
    # The file was written anew once it was proved; it still answers as the one that was.
    assert report.summary == read_spec(good_onnx).parity
    assert contents(checkpoint.parent) == before
    assert list(Path.cwd().iterdir()) == []


def test_other_data_with_the_same_classes(good_onnx: Path, checkpoint: Path, pictures: Path) -> None:
    summary = verify(good_onnx, checkpoint, data=str(pictures)).summary
    assert summary.passed
    assert (summary.data, summary.images) == (pictures.name, len(list(pictures.glob("test/*/*"))))
    assert summary.accuracy is not None
    assert summary.accuracy == summary.reference_accuracy


def test_other_data_with_other_classes_has_no_accuracy(
    good_torchscript: Path, checkpoint: Path, other_pictures: Path
) -> None:
    report = verify(good_torchscript, checkpoint, data=str(other_pictures))
    assert failed(report) == set()
    assert (report.format, report.summary.provider) == ("torchscript", "cpu")
    document = json.loads(msgspec.json.encode(report.row()))
    assert (document["accuracy"], document["reference_accuracy"]) == (None, None)
    assert document["agreement"] == 1.0


def test_a_stale_checkpoint_fails(good_onnx: Path, stale: Path, pictures: Path) -> None:
    report = verify(good_onnx, stale, data=str(pictures))
    assert failed(report) == {"tolerance", "agreement"}
    assert not report.summary.passed
    assert report.summary.required_tolerance is not None
    assert report.summary.required_tolerance > 1e-3
    assert report.summary.agreement < 1


def test_a_tolerance_of_ones_own_is_held_to_and_shown(good_onnx: Path, checkpoint: Path, pictures: Path) -> None:
    report = verify(good_onnx, checkpoint, data=str(pictures), atol=0.0, rtol=1e-12)
    assert failed(report) == {"tolerance"}
    assert (report.summary.atol, report.summary.rtol) == (0.0, 1e-12)


def test_a_negative_tolerance_is_refused(good_onnx: Path, checkpoint: Path, pictures: Path) -> None:
    with pytest.raises(UsageError, match="atol is -1"):
        verify(good_onnx, checkpoint, data=str(pictures), atol=-1)


def test_too_few_images_prove_nothing(good_onnx: Path, checkpoint: Path, few_pictures: Path) -> None:
    with pytest.raises(DataError, match="few has 990 test images"):
        verify(good_onnx, checkpoint, data=str(few_pictures))


def edited(source: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, name)
    return Path(name)


def without_spec(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def with_newer_spec(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"schema_version":1', '"schema_version":2')


def with_ungated_precision(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"fp32"', '"int8"')


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (without_spec, ModelFileError, "carries no model spec"),
        (with_newer_spec, SpecError, "spec schema 2"),
        (with_ungated_precision, UsageError, "unknown precision 'int8'"),
    ],
)
def test_an_artifact_with_another_spec_is_refused(
    change: Callable[[onnx.ModelProto], None],
    error: type[CifarxError],
    text: str,
    good_onnx: Path,
    checkpoint: Path,
    pictures: Path,
) -> None:
    with pytest.raises(error, match=text):
        verify(edited(good_onnx, "edited.onnx", change), checkpoint, data=str(pictures))


def test_files_that_are_none_are_named(good_onnx: Path, checkpoint: Path, pictures: Path) -> None:
    Path("broken.onnx").write_bytes(good_onnx.read_bytes()[:1000])
    Path("broken.torchscript.pt").write_bytes(b"PK")
    Path("broken.pth").write_bytes(checkpoint.read_bytes()[:1000])
    for artifact, trained in [
        ("absent.onnx", checkpoint),
        ("broken.onnx", checkpoint),
        ("broken.torchscript.pt", checkpoint),
        (good_onnx, "absent.pth"),
        (good_onnx, "broken.pth"),
        (good_onnx, good_onnx),
    ]:
        wrong = trained if artifact == good_onnx else artifact
        with pytest.raises(ModelFileError, match=str(wrong)):
            verify(artifact, trained, data=str(pictures))


def test_a_file_of_no_backend_is_refused(good_onnx: Path, checkpoint: Path) -> None:
    shutil.copy(good_onnx, "model.bin")
    with pytest.raises(UsageError, match=r"no backend opens model\.bin"):
        verify("model.bin", checkpoint)
