"""Check the parity of an existing file with a checkpoint or with another file, on any data."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.adoption.described_copy import is_foreign, write_described_copy
from cifarx_export.adoption.onnx_functions import inline_functions
from cifarx_export.adoption.onnx_weights import load_onnx_model
from cifarx_export.formats.onnx.half_precision import MAX_IMAGES, check_half_precision
from cifarx_export.formats.registry import FORMATS, PRECISIONS
from cifarx_export.layerwise.locate import locate as locate_layer
from cifarx_export.layerwise.locate import require_locatable
from cifarx_export.parity.chance import require_better_than_chance
from cifarx_export.parity.checks import Check
from cifarx_export.parity.compare import (
    OutputShapeError,
    ParityResult,
    Reference,
    check_parity,
    parity_batch_sizes,
    reference_batches,
    run_reference,
)
from cifarx_export.parity.data import ParityData, load_parity_data, name_classes
from cifarx_export.parity.html import require_html_path, write_html_report
from cifarx_export.parity.report import ParityReport
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.base import Backend, require_file
from cifarx_serve.backends.other_runtimes.registry import open_in_runtime, require_runtime
from cifarx_serve.backends.registry import backend_for, model_file, open_backend
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import CifarxError, DeviceMemoryError, ModelFileError, UsageError, error_message
from cifarx_serve.files.file_format import FileFormat, detect_format
from cifarx_serve.progress import Progress, silent
from cifarx_serve.system.terminal import require_utf8
from cifarx_train.checkpoints.checkpoint import file_sha256, weights_sha256
from cifarx_train.checkpoints.source_weights import load_model
from cifarx_train.data.dataset import OnError
from cifarx_train.data.selection import DataSource
from cifarx_train.models.description import describe_model
from cifarx_train.models.options import NO_OPTIONS, ModelOptions, SpecOverrides
from cifarx_train.models.spec_file import read_spec_file
from cifarx_train.pytorch_backend import PyTorchBackend


def verify(
    artifact: str | Path,
    reference: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    model: str | ModelOptions | None = None,
    data: str | DataSource = "auto",
    on_error: OnError = "raise",
    device: str = "cpu",
    batch_size: int | None = None,
    spec: str | Path | None = None,
    locate: bool = False,
    runtime: str | None = None,
    html_report: str | Path | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    allow_chance_accuracy: bool = False,
    progress: Progress = silent,
) -> ParityReport:
    """Check the parity of a file with another file or with a checkpoint.

    The tolerance is that of the lower precision of the two. A failed check does not raise: see
    `ParityReport.summary.passed`.

    Args:
        artifact: file to check, of any format that a backend opens.
        reference: file to compare it with. Give either this or `checkpoint`.
        checkpoint: checkpoint to compare it with; its file may have any name.
        model: network, as `--model` names it, for a checkpoint that does not contain it; or `ModelOptions` with all
            that the user states, also about files without a spec.
        data: dataset: auto, cifar10, builtin, or the path of images; or a `DataSource` that says how they are split and
            labeled.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them with a warning.
        device: device of the artifact; the reference runs on the CPU.
        batch_size: another batch size to check, in addition to 1, 3 and 64.
        spec: TOML or JSON file with fields of the model spec, for files that carry none.
        locate: if the check fails, find the first layer that differs and add it to the checks.
        runtime: runs an ONNX file in another runtime than ONNX Runtime: opencv, openvino, tract or web.
        html_report: path of an HTML parity report to write, ending in `.html`.
        atol, rtol: replacements for the tolerance of the precision.
        allow_chance_accuracy: also check a network that is no better than chance on labeled images.
        progress: called with a line about each step.

    Raises:
        UsageError, ModelFileError, SpecError, DataError, OutputError: an argument or a file cannot be used.
        CheckFailed: the reference is no better than chance, and its preprocessing or classes were given or assumed.
    """
    if (reference is None) == (checkpoint is None):
        raise UsageError("verify needs exactly one reference", "give a second file or --ckpt")
    require_html_path(html_report)
    require_utf8(artifact, reference, checkpoint)  # the report names them
    with ExitStack() as stack:
        options = model if isinstance(model, ModelOptions) else ModelOptions(model)
        if spec is not None:
            options = options._replace(overrides=read_spec_file(Path(spec))).with_network()
        paths = _Paths(Path(artifact), Path(reference or checkpoint or ""), checkpoint is not None, options)
        if runtime is not None:
            require_runtime(runtime, model_file(paths.artifact))
            if locate:
                raise UsageError(f"--locate cannot read the layers of runtime {runtime}", "leave one of them out")
        if locate:
            require_locatable(model_file(paths.artifact), model_file(paths.reference))
        opened = _open(paths, device, runtime, data, on_error, stack)
        if paths.options != NO_OPTIONS:
            for line in describe_model(opened.reference.spec, paths.reference.name, paths.options.origins):
                progress(line)
        tolerance = get_tolerance(opened.precision, atol, rtol, opened.reference.spec.output)
        parity_data = load_parity_data(opened.reference.spec, data, on_error)
        batch_sizes = parity_batch_sizes(batch_size, len(parity_data.images))
        outputs = _run_reference(opened, paths.reference, parity_data, progress)
        require_better_than_chance(
            outputs,
            str(paths.reference),
            trained_here=opened.reference.spec.training is not None and not options.overrides.fields,
            allowed=allow_chance_accuracy,
            progress=progress,
        )
        result = check_parity(outputs, opened.artifact, tolerance, progress, batch_sizes)
        result = result.with_checks(_half_precision_checks(opened, outputs, progress))
        result = _with_weights_check(result, opened).renamed(opened.files[0], paths.artifact.name)
        if locate and not result.passed and result.error_analysis:
            progress("looking for the first layer that differs")
            worst = parity_data.images[result.error_analysis.worst[0].image][None]
            result = msgspec.structs.replace(
                result, checks=(*result.checks, _layer_check(opened, worst, paths.options))
            )
        report = _report(paths, opened, result)
        if html_report is not None:
            write_html_report(Path(html_report), [report], parity_data.images)
        return report


class _Paths(NamedTuple):
    """The files as the user gave them."""

    artifact: Path
    reference: Path
    is_checkpoint: bool
    options: ModelOptions


class _Opened(NamedTuple):
    """Both files, opened.

    Attributes:
        artifact, reference: the backends.
        files: the files that were opened: copies where a spec had to be embedded.
        weights_sha256: checksum of the reference's weights, if it is a checkpoint.
    """

    artifact: Backend
    reference: Backend
    files: tuple[Path, Path]
    weights_sha256: str | None

    @property
    def precision(self) -> str:
        """The lower precision of the two. A checkpoint always runs in fp32, whatever its spec states."""
        specs = [side.spec for side in (self.artifact, self.reference) if not isinstance(side, PyTorchBackend)]
        return max((spec.precision for spec in specs), key=PRECISIONS.index, default=PRECISIONS[0])


def _open(
    paths: _Paths, device: str, runtime: str | None, data: str | DataSource, on_error: OnError, stack: ExitStack
) -> _Opened:
    """Open both files, with the stated spec where a file carries none.

    Raises:
        UsageError: a spec is stated, but both files carry one.
    """
    files = (model_file(paths.artifact), model_file(paths.reference))
    is_checkpoint = paths.is_checkpoint or backend_for(files[1]) is PyTorchBackend
    overrides = paths.options.overrides
    if overrides.fields:
        second = files[1] if is_checkpoint else _described(files[1], overrides, stack)
        copies = (_described(files[0], overrides, stack), second)
        if copies == files and not is_checkpoint:
            stated = ", ".join(dict.fromkeys(overrides.origins.values())) or "the stated spec"
            raise UsageError(f"both files contain a spec, so {stated} would be ignored", "leave it out")
        files = copies
    artifact = stack.enter_context(_open_one(files[0], paths.artifact, device, paths.options, runtime))
    if not is_checkpoint:
        reference = stack.enter_context(_open_one(files[1], paths.reference, "cpu", NO_OPTIONS))
        return _Opened(artifact, reference, files, None)
    loaded = load_model(files[1], paths.options)
    if "class_names" not in artifact.spec.assumed:
        loaded = loaded._replace(spec=name_classes(loaded.spec, data, on_error))
    trained = stack.enter_context(PyTorchBackend.from_checkpoint(loaded, parse_device("cpu")))
    return _Opened(artifact, trained, files, weights_sha256(loaded.weights))


def _described(path: Path, overrides: SpecOverrides, stack: ExitStack) -> Path:
    """Return a file that has a spec, or a copy with the stated spec of a file that has none."""
    if not is_foreign(path):
        return path
    return write_described_copy(path, overrides, Path(stack.enter_context(tempfile.TemporaryDirectory())))


def _open_one(path: Path, original: Path, device: str, options: ModelOptions, runtime: str | None = None) -> Backend:
    """Open one file; errors name the user's file where `path` is a copy of it."""
    require_file(path)
    try:
        if runtime is not None:
            return open_in_runtime(runtime, path, parse_device(device))
        if backend_for(path) is PyTorchBackend:
            return PyTorchBackend(path, parse_device(device), options)
        return open_backend(path, device=device)
    except ModelFileError as error:
        raise ModelFileError(error.problem.replace(str(path), str(original)), error.remedy) from error


def _run_reference(opened: _Opened, path: Path, data: ParityData, progress: Progress) -> Reference:
    """Run the reference and check that it returns logits.

    Raises:
        ModelFileError: the reference does not run, or returns something else.
    """
    backend = opened.reference
    try:
        return run_reference(backend, data, progress)
    except DeviceMemoryError:
        raise
    except OutputShapeError as error:
        raise ModelFileError(
            f"the reference {path} returns {error}",
            "give a classifier, and a spec with all of its class names",
        ) from error
    except Exception as error:  # the errors of the runtimes have no common base class
        reason = error_message(error).replace(str(opened.files[1]), str(path))
        raise ModelFileError(
            f"the reference {path} does not run ({reason})", "give one that accepts any batch size"
        ) from error


def _with_weights_check(result: ParityResult, opened: _Opened) -> ParityResult:
    """Add a check that the artifact was made from the checkpoint's weights, if both checksums are known."""
    recorded = opened.artifact.spec.weights_sha256
    if recorded is None or opened.weights_sha256 is None:
        return result
    same = recorded == opened.weights_sha256
    return result.with_checks(
        [Check("weights", same, "same as the checkpoint's" if same else "exported from other weights")]
    )


def _half_precision_checks(opened: _Opened, reference: Reference, progress: Progress) -> list[Check]:
    """Check an ONNX file in fp16 in float16, unless it ran on a GPU: a CPU computes it in float32."""
    backend = opened.artifact
    if backend.spec.precision != "fp16" or detect_format(opened.files[0]) is not FileFormat.ONNX:
        return []
    if backend.provider.startswith(("CUDA", "Tensorrt")):
        return []
    progress("fp16: simulating it, because a CPU computes it in float32")
    model = inline_functions(load_onnx_model(opened.files[0]), opened.files[0])
    batches = reference_batches(reference, MAX_IMAGES, backend.spec)
    return check_half_precision(model, "fp16", batches, backend.spec)


def _layer_check(opened: _Opened, images: NDArray[np.uint8], options: ModelOptions) -> Check:
    try:
        difference = locate_layer(*opened.files, images, options)
    except CifarxError as error:
        return Check("layer", False, str(error))
    if difference is None:
        return Check("layer", True, "no layer differs: see the other checks and the optimizations of the runtime")
    return Check("layer", False, str(difference))


def _report(paths: _Paths, opened: _Opened, result: ParityResult) -> ParityReport:
    return ParityReport(
        artifact=paths.artifact.name,
        artifact_sha256=file_sha256(model_file(paths.artifact)),
        checkpoint=paths.reference.name,
        checkpoint_sha256=file_sha256(model_file(paths.reference)),
        format=_format_name(paths.artifact),
        precision=opened.precision,
        checks=result.checks,
        summary=result.summary,
        error_analysis=result.error_analysis,
    )


def _format_name(path: Path) -> str:
    """Return the name of the export format with this suffix, or the suffix if no format has it."""
    return next((name for name, kind in FORMATS.items() if path.name.endswith(kind.suffix)), path.suffix)
