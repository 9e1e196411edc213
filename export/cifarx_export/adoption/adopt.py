"""Adopt a classifier that another program wrote: make a file of cifarx from it, and check that both answer alike."""

import shlex
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from cifarx_export.adoption.foreign_file import ForeignFile
from cifarx_export.checked_artifact import ArtifactWriter, ExportResult
from cifarx_export.formats.onnx.converter import OnnxArtifact
from cifarx_export.formats.onnx.half_precision import MAX_IMAGES, check_half_precision
from cifarx_export.formats.registry import get_format
from cifarx_export.parity.assumed_preprocessing import require_no_better_preprocessing
from cifarx_export.parity.chance import require_better_than_chance
from cifarx_export.parity.compare import BATCH_SIZES, ParityResult, reference_batches, run_reference
from cifarx_export.parity.data import load_parity_data, name_classes
from cifarx_export.parity.html import require_html_path, write_html_report
from cifarx_export.parity.stated_output import require_stated_output
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.base import require_file
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.files.atomic import require_writable
from cifarx_serve.files.file_format import CHECKPOINT_FORMATS, FileFormat, detect_format
from cifarx_serve.progress import Progress, silent
from cifarx_serve.system.versions import library_versions
from cifarx_train.checkpoints.checkpoint import file_sha256
from cifarx_train.data.dataset import OnError
from cifarx_train.data.selection import DataSource
from cifarx_train.models.description import describe_model
from cifarx_train.models.options import SpecOverrides

NO_OVERRIDES: Final = SpecOverrides()


def adopt(
    file: str | Path,
    *,
    overrides: SpecOverrides = NO_OVERRIDES,
    data: str | DataSource = "auto",
    on_error: OnError = "raise",
    out: str | Path | None = None,
    html_report: str | Path | None = None,
    allow_chance_accuracy: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Make a file of cifarx from an ONNX or TorchScript file of another program.

    The adopted file has a spec, a variable batch size, and standard names of its input and output. It contains all of
    its weights. It is written only if it answers as the given file does, which runs as it is, on real images.

    Args:
        file: an ONNX file with any names, layout, opset and types, or a TorchScript file.
        overrides: fields of the spec that the user states.
        data: images for the parity check: auto, cifar10, builtin, or the path of images; or a
            `DataSource` that says how they are split and labeled.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them with a warning.
        out: path of the adopted file. The default is `STEM.adopted.onnx` or `STEM.adopted.torchscript.pt`, next to the
            given file.
        html_report: path of an HTML parity report to write, ending in `.html`.
        allow_chance_accuracy: also adopt a network that is no better than chance on labeled images, or better with
            another preprocessing than the one that is assumed.
        progress: called with a line of text at each step, and about each part of the spec.

    Raises:
        UsageError: the user has to state more about the file, or it is not one that can be adopted.
        ModelFileError: the file cannot be read, or does not run.
        SpecError: what the user states is not valid.
        DataError: the images cannot be read, or are too few.
        CheckFailed: the outputs are not what the spec says, or the accuracy is chance, or another preprocessing than
            the assumed one is better.
        OutputError: a file cannot be written.
    """
    path = Path(file)
    require_html_path(html_report)
    with tempfile.TemporaryDirectory() as folder:
        progress(f"reading {path}")
        foreign = open_foreign_file(path, Path(folder))
        target = _target(path, foreign, out)
        drafted = foreign.describe(overrides)
        spec = name_classes(drafted, data, on_error)
        origins = dict(overrides.origins)
        if spec != drafted:
            origins["class_names"] = f"--data {data}"
        for line in describe_model(spec, path.name, origins):
            progress(line)
        images = load_parity_data(spec, data, on_error)
        with foreign.open_original(spec) as original:
            reference = run_reference(original, images, progress)
            require_stated_output(reference, str(path), is_stated="output" in overrides.fields)
            require_better_than_chance(
                reference, str(path), trained_here=False, allowed=allow_chance_accuracy, progress=progress
            )
            if not allow_chance_accuracy:
                require_no_better_preprocessing(original, reference, str(path), progress)
        writer = ArtifactWriter(path.name, file_sha256(path), reference, BATCH_SIZES, progress)
        artifact = foreign.adopted(spec)
        facts = {"format": foreign.kind, "adopted": path.name, **library_versions()}
        spec = artifact.complete_spec(msgspec.structs.replace(spec, exporter=facts))
        if isinstance(artifact, OnnxArtifact) and spec.precision == "fp16":
            progress("fp16: simulating it, because a CPU computes it in float32")
            batches = reference_batches(reference, MAX_IMAGES, spec)
            artifact.checks = check_half_precision(artifact.model, "fp16", batches, spec)
        tolerance = get_tolerance(spec.precision, output=spec.output)
        parity = writer.write(get_format(foreign.kind), artifact, spec, target, tolerance)
        _require_any_batch_size(foreign, parity)
        result = writer.report(foreign.kind, spec, target, parity)
    if html_report is not None:
        write_html_report(Path(html_report), [result.report], images.images)
    return result


def open_foreign_file(path: Path, folder: Path) -> ForeignFile:
    """Open a file of another program by its content.

    Args:
        path: the file.
        folder: a temporary folder for copies.

    Raises:
        ModelFileError, UsageError: the file is missing or damaged, or not one that can be adopted.
    """
    require_file(path)
    kind = detect_format(path)
    if kind is FileFormat.ONNX:
        from cifarx_export.adoption.onnx_file import OnnxFile

        return OnnxFile(path, folder)
    if kind is FileFormat.TORCHSCRIPT:
        from cifarx_export.adoption.torchscript_file import TorchScriptFile

        return TorchScriptFile(path)
    if kind in CHECKPOINT_FORMATS:
        raise UsageError(f"{path} is a checkpoint", f"export it with `cifarx export --ckpt {shlex.quote(str(path))}`")
    raise ModelFileError(f"{path} is neither an ONNX file nor a TorchScript file", "give one of them")


def _target(path: Path, foreign: ForeignFile, out: str | Path | None) -> Path:
    """Return the path of the adopted file.

    Raises:
        UsageError: its name does not have the suffix of the format, or it is the given file.
        OutputError: its folder cannot be written.
    """
    suffix = get_format(foreign.kind).suffix
    target = path.with_name(f"{path.name.partition('.')[0]}.adopted{suffix}") if out is None else Path(out)
    if not target.name.endswith(suffix):
        raise UsageError(f"cannot write a {foreign.kind} file as {target}", f"give a name that ends in {suffix}")
    if target.exists() and target.samefile(path):
        raise UsageError(f"{target} is the file to adopt", "give another --out")
    require_writable(target.parent)
    return target


def _require_any_batch_size(foreign: ForeignFile, parity: ParityResult) -> None:
    """Check that a file that states a fixed batch size answers alike with others: every server batches its requests.

    Raises:
        ModelFileError: it does not.
    """
    runs = [check for check in parity.failures if check.name.startswith("batch ")]
    if foreign.batch_size is not None and runs:
        raise ModelFileError(
            f"{foreign.path} takes only batches of {foreign.batch_size}, and cannot take others ({runs[0].found})",
            'export it again with a variable batch size, as dynamic_shapes=({0: "batch"},) of torch.onnx.export',
        )
