"""Verify: an artifact against a checkpoint or another file, on the training dataset and on others."""

import hashlib
import html
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from torch import Tensor, nn

from cifarx_export.parity.report import ParityReport
from cifarx_export.verify import verify
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.errors import CheckFailed, CifarxError, DataError, ModelFileError, SpecError, UsageError
from tests.support.conversion import write_artifact
from tests.support.foreign_models import write_color_folder, write_onnx

pytestmark = pytest.mark.usefixtures("remembered_outputs")


def failed(report: ParityReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_good_artifact_passes_on_the_data_set_of_its_training(good_onnx: Path, checkpoint: Path) -> None:
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
    # PyTorch and NumPy may choose different classes for an image or two whose largest logits are equal.
    assert report.summary.reference_accuracy == pytest.approx(training.test_accuracy, abs=1.1e-3)
    assert report.summary.accuracy == report.summary.reference_accuracy
    # The file was written again with the parity summary; it must still return the same logits.
    assert report.summary == read_spec(good_onnx).parity
    assert contents(checkpoint.parent) == before
    assert list(Path.cwd().iterdir()) == []


def test_other_data_with_the_same_classes(good_onnx: Path, checkpoint: Path, image_folder: Path) -> None:
    summary = verify(good_onnx, checkpoint, data=str(image_folder)).summary
    assert summary.passed
    assert (summary.data, summary.images) == (image_folder.name, len(list(image_folder.glob("test/*/*"))))
    assert summary.accuracy is not None
    assert summary.accuracy == summary.reference_accuracy


def test_other_data_with_other_classes_has_no_accuracy(
    good_torchscript: Path, checkpoint: Path, relabeled_image_folder: Path
) -> None:
    report = verify(good_torchscript, checkpoint, data=str(relabeled_image_folder))
    assert failed(report) == set()
    assert (report.format, report.summary.provider) == ("torchscript", "cpu")
    document = json.loads(msgspec.json.encode(report.row()))
    assert (document["accuracy"], document["reference_accuracy"]) == (None, None)
    assert document["agreement"] == 1.0


class ScaledOutputs(nn.Module):
    """Scales the outputs of a network up and down again, beyond the range of float16 in between."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits * 1e4 * 1e4 * 1e-4 * 1e-4


@pytest.mark.slow
def test_a_float16_file_that_overflows_fails_although_it_runs_in_float32(checkpoint: Path) -> None:
    path = write_artifact(checkpoint, "onnx", Path("scaled.fp16.onnx"), ScaledOutputs, "fp16")
    report = verify(path, checkpoint, html_report="parity.html")
    assert failed(report) == {"float16 range"}
    assert report.summary.provider == "CPUExecutionProvider"
    found = next(check.found for check in report.checks if check.name == "float16 range")
    assert re.match(r"node_mul\S* \(Mul\) reaches \S+ and overflows on a GPU", found)
    assert found in html.unescape(Path("parity.html").read_text(encoding="utf-8"))


def test_other_weights_fail(good_onnx: Path, other_checkpoint: Path, image_folder: Path) -> None:
    report = verify(good_onnx, other_checkpoint, data=str(image_folder))
    assert failed(report) == {"weights", "tolerance", "agreement"}
    assert not report.summary.passed
    assert report.summary.required_tolerance is not None
    assert report.summary.required_tolerance > 1e-3
    assert report.summary.agreement < 1


def test_a_given_tolerance_is_used_and_reported(good_onnx: Path, checkpoint: Path, image_folder: Path) -> None:
    report = verify(good_onnx, checkpoint, data=str(image_folder), atol=0.0, rtol=1e-12)
    assert failed(report) == {"tolerance"}
    assert (report.summary.atol, report.summary.rtol) == (0.0, 1e-12)


def test_a_negative_tolerance_is_rejected(good_onnx: Path, checkpoint: Path, image_folder: Path) -> None:
    with pytest.raises(UsageError, match="atol is -1"):
        verify(good_onnx, checkpoint, data=str(image_folder), atol=-1)


def test_training_images_join_a_small_test_split(good_onnx: Path, checkpoint: Path, small_image_folder: Path) -> None:
    lines: list[str] = []
    summary = verify(good_onnx, checkpoint, data=str(small_image_folder), progress=lines.append).summary
    assert (summary.passed, summary.images, summary.test_images, summary.training_images) == (True, 1000, 990, 10)
    assert "reference: running 990 test and 10 training images of few with pytorch (cpu)" in lines
    assert summary.warnings == ()


def edited(source: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    del model.metadata_props[next(i for i, entry in enumerate(model.metadata_props) if entry.key == "cifarx.seal")]
    change(model)
    onnx.save(model, name)
    return Path(name)


def without_spec(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def with_newer_spec(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"schema_version":2', '"schema_version":3')


def with_unknown_precision(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"fp32"', '"int2"')


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (without_spec, ModelFileError, "contains no model spec"),
        (with_newer_spec, SpecError, "spec schema 3"),
        (with_unknown_precision, SpecError, "malformed model spec"),
    ],
)
def test_an_artifact_without_a_valid_spec_is_rejected(
    change: Callable[[onnx.ModelProto], None],
    error: type[CifarxError],
    text: str,
    good_onnx: Path,
    checkpoint: Path,
    image_folder: Path,
) -> None:
    with pytest.raises(error, match=text):
        verify(edited(good_onnx, "edited.onnx", change), checkpoint, data=str(image_folder))


def test_missing_and_damaged_files_are_named(good_onnx: Path, checkpoint: Path, image_folder: Path) -> None:
    Path("broken.onnx").write_bytes(good_onnx.read_bytes()[:1000])
    Path("broken.torchscript.pt").write_bytes(b"PK")
    Path("broken.pth").write_bytes(checkpoint.read_bytes()[:1000])
    cases: list[tuple[str | Path, str | Path]] = [
        ("absent.onnx", checkpoint),
        ("broken.onnx", checkpoint),
        ("broken.torchscript.pt", checkpoint),
        (good_onnx, "absent.pth"),
        (good_onnx, "broken.pth"),
    ]
    for artifact, trained in cases:
        wrong = trained if artifact == good_onnx else artifact
        with pytest.raises(ModelFileError, match=str(wrong)):
            verify(artifact, trained, data=str(image_folder))


def test_a_file_that_no_backend_opens_is_rejected(good_onnx: Path, checkpoint: Path) -> None:
    shutil.copy(good_onnx, "model.bin")  # files are opened by their content
    with pytest.raises(DataError, match="nowhere"):
        verify("model.bin", checkpoint, data="nowhere")
    Path("text.bin").write_text("text")
    with pytest.raises(UsageError, match=r"no backend opens text\.bin"):
        verify("text.bin", checkpoint)


def test_a_checkpoint_given_by_keyword_may_have_any_name(good_onnx: Path, checkpoint: Path, image_folder: Path) -> None:
    shutil.copy(checkpoint, "weights.bin")
    assert verify(good_onnx, checkpoint="weights.bin", data=str(image_folder)).summary.passed
    with pytest.raises(ModelFileError, match=str(good_onnx)):
        verify(good_onnx, checkpoint=good_onnx)


@pytest.mark.parametrize("reference", [None, "b.onnx"])
def test_exactly_one_reference_is_required(reference: str | None) -> None:
    with pytest.raises(UsageError, match="verify needs exactly one reference: give a second file or --ckpt"):
        verify("a.onnx", reference, checkpoint=None if reference is None else "c.pth")


def test_two_artifacts_in_other_folders(good_onnx: Path, good_torchscript: Path, image_folder: Path) -> None:
    for source, folder in ((good_onnx, "a"), (good_torchscript, "b")):
        Path(folder).mkdir()
        shutil.copy(source, folder)
    report = verify(Path("a") / good_onnx.name, Path("b") / good_torchscript.name, data=str(image_folder), batch_size=5)
    assert failed(report) == set()
    assert report.checkpoint == good_torchscript.name
    assert report.summary.batch_sizes == (1, 3, 5, 64)


@pytest.mark.slow
def test_two_checkpoints(checkpoint: Path, other_checkpoint: Path, image_folder: Path) -> None:
    assert verify(checkpoint, checkpoint, data=str(image_folder)).summary.passed
    assert failed(verify(checkpoint, other_checkpoint, data=str(image_folder))) == {"tolerance", "agreement"}


def as_int8(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"precision":"fp32"', '"precision":"int8"')


def test_the_tolerance_is_that_of_the_lower_precision(good_onnx: Path, image_folder: Path) -> None:
    lower = edited(good_onnx, "lower.onnx", as_int8)
    for pair in ((lower, good_onnx), (good_onnx, lower)):
        report = verify(*pair, data=str(image_folder))
        assert (report.summary.passed, report.summary.atol, report.precision) == (True, None, "int8")


def foreign(source: Path, name: str) -> Path:
    """Write the network with other tensor names, an inner tensor called `logits`, and no spec."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        names = {"input": "image", "logits": "scores", "linear": "logits"}
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        graph.input[0].name, graph.output[0].name = "image", "scores"
        del graph.value_info[:], model.metadata_props[:]

    return edited(source, name, change)


@pytest.fixture
def spec_file(good_onnx: Path) -> Path:
    path = Path("spec.json")
    path.write_text(read_spec(good_onnx).to_json())
    return path


def verify_with(spec: str | Path, artifact: str | Path, reference: str | Path, data: Path) -> ParityReport:
    """Compare two files with a stated spec, on noise."""
    return verify(artifact, reference, spec=spec, data=str(data), allow_chance_accuracy=True)


def test_a_foreign_onnx_file_with_an_external_spec(
    good_onnx: Path, checkpoint: Path, image_folder: Path, spec_file: Path
) -> None:
    other = foreign(good_onnx, "other.onnx")
    report = verify_with(spec_file, other, checkpoint, image_folder)
    assert failed(report) == set()
    assert (report.artifact, report.artifact_sha256) == ("other.onnx", sha256(other))
    assert "weights" not in {check.name for check in report.checks}  # the external spec states no checksum
    onnx.save(onnx.load(other), "apart.onnx", save_as_external_data=True, location="w.bin", size_threshold=100)
    assert verify_with(spec_file, "apart.onnx", other, image_folder).summary.max_abs_error == 0


def test_a_foreign_torchscript_file_with_an_external_spec(
    good_torchscript: Path, good_onnx: Path, image_folder: Path, spec_file: Path
) -> None:
    with zipfile.ZipFile(good_torchscript) as source, zipfile.ZipFile("other.torchscript.pt", "w") as bare:
        for name in source.namelist():
            if "/extra/" not in name:
                bare.writestr(name, source.read(name))
    assert verify_with(spec_file, "other.torchscript.pt", good_onnx, image_folder).summary.passed


def test_a_fixed_batch_size_fails_and_cannot_be_the_reference(
    good_onnx: Path, image_folder: Path, spec_file: Path
) -> None:
    def fix(model: onnx.ModelProto) -> None:
        del model.metadata_props[:], model.graph.value_info[:]
        for info in (model.graph.input[0], model.graph.output[0]):
            info.type.tensor_type.shape.dim[0].dim_value = 1

    fixed = edited(good_onnx, "fixed.onnx", fix)
    report = verify_with(spec_file, fixed, good_onnx, image_folder)
    assert failed(report) == {"interface", "batch 3", "batch 64", "edge inputs"}
    with pytest.raises(
        ModelFileError, match=r"the reference fixed\.onnx does not run \(.*\): give one that accepts any batch size"
    ):
        verify_with(spec_file, good_onnx, fixed, image_folder)


def test_unusable_specs_are_rejected(good_onnx: Path, checkpoint: Path, spec_file: Path, image_folder: Path) -> None:
    other = foreign(good_onnx, "other.onnx")
    Path("junk.json").write_text('{"model":')
    Path("unknown.toml").write_text("colors = 1")
    Path("text.onnx").write_text("text")
    Path("text.torchscript.pt").write_text("text")
    cases: list[tuple[str | Path, str | Path, str | Path, type[CifarxError], str]] = [
        (
            good_onnx,
            good_onnx,
            spec_file,
            UsageError,
            r"both files contain a spec, so --spec spec\.json would be ignored",
        ),
        (other, checkpoint, "junk.json", UsageError, r"junk\.json is neither JSON nor TOML"),
        (other, checkpoint, "unknown.toml", UsageError, r"unknown field in unknown\.toml 'colors'"),
        (other, checkpoint, "absent.json", UsageError, r"cannot read absent\.json"),
        ("text.onnx", checkpoint, spec_file, CifarxError, r"text\.onnx"),
        ("text.torchscript.pt", checkpoint, spec_file, CifarxError, r"text\.torchscript\.pt is not"),
    ]
    for artifact, reference, spec, error, text in cases:
        with pytest.raises(error, match=text):
            verify_with(spec, artifact, reference, image_folder)


def test_a_stated_spec_with_other_classes(good_onnx: Path, image_folder: Path, spec_file: Path) -> None:
    other = foreign(good_onnx, "other.onnx")
    spec = read_spec(good_onnx)
    spec_file.write_text(msgspec.structs.replace(spec, class_names=tuple("abcdefghij")).to_json())
    assert "class names" in failed(verify_with(spec_file, other, good_onnx, image_folder))
    spec_file.write_text(msgspec.structs.replace(spec, class_names=("a", "b")).to_json())
    with pytest.raises(UsageError, match="returns 10 values per image, which do not fit 2 class names"):
        verify_with(spec_file, good_onnx, other, image_folder)
    larger = msgspec.structs.replace(spec.input, height=40)
    spec_file.write_text(msgspec.structs.replace(spec, input=larger).to_json())
    with pytest.raises(UsageError, match=r"other\.onnx takes images with height 32, not 40"):
        verify_with(spec_file, other, good_onnx, image_folder)


def test_the_layer_is_in_the_report_and_the_page(good_onnx: Path, other_checkpoint: Path, image_folder: Path) -> None:
    report = verify(good_onnx, other_checkpoint, data=str(image_folder), locate=True, html_report="page.html")
    assert "model.0 (Conv node" in next(check.found for check in report.checks if check.name == "layer")
    assert "model.0" in Path("page.html").read_text()
    with pytest.raises(UsageError, match=r"cannot write a report as page\.pdf: give a name that ends in \.html"):
        verify(good_onnx, other_checkpoint, html_report="page.pdf")


def test_the_layers_of_torchscript_cannot_be_located(good_torchscript: Path, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        verify(good_torchscript, checkpoint, locate=True)


def test_any_names_of_tensors_and_axes_are_compared(tmp_path: Path) -> None:
    """A file of one's own against one's own checkpoint, as PyTorch's exporters name everything."""
    folder = write_color_folder(tmp_path / "colors")
    Path("spec.toml").write_text('class_names = ["red", "green", "blue"]\n[input]\nheight = 8\nwidth = 8\n')
    first = write_onnx(Path("a.onnx"), names=("pixel_values", "scores"), batch="batch_size")
    second = write_onnx(Path("b.onnx"), names=("x", "y"), batch=None, opset=11)
    report = verify("a.onnx", "b.onnx", spec="spec.toml", data=str(folder))
    assert failed(report) == set()
    assert report.summary.accuracy is not None
    assert report.summary.accuracy > 0.9
    assert [check.name for check in report.checks if check.assumed] == ["output"]
    with pytest.raises(ModelFileError, match=r"a\.onnx contains no model spec: .*adopt"):
        verify(first, second, data=str(folder))


def test_chance_stops_a_stated_spec_unless_it_is_allowed(tmp_path: Path) -> None:
    folder = write_color_folder(tmp_path / "colors")
    Path("spec.toml").write_text('class_names = ["blue", "red", "green"]\n[input]\nheight = 8\nwidth = 8\n')
    write_onnx(Path("a.onnx"))
    with pytest.raises(CheckFailed, match="on 3 classes is chance"):
        verify("a.onnx", "a.onnx", spec="spec.toml", data=str(folder))
    report = verify("a.onnx", "a.onnx", spec="spec.toml", data=str(folder), allow_chance_accuracy=True)
    assert report.summary.passed
