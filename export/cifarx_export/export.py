"""Export a checkpoint: convert it, check parity, and give an artifact its name only if the parity check passed."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.registry import (
    NO_OPTIONS,
    Artifact,
    ConversionSource,
    ExportOptions,
    Format,
    get_format,
    require_supported,
)
from cifarx_export.parity.compare import (
    EVAL_BATCH_SIZE,
    ParityResult,
    Reference,
    check_parity,
    parity_batch_sizes,
    run_reference,
)
from cifarx_export.parity.data import load_parity_data, load_training_images
from cifarx_export.parity.html import require_html_path, write_html_report
from cifarx_export.parity.report import FAILED_SUFFIX, SUFFIX, ParityReport
from cifarx_export.parity.tolerances import Tolerance, get_tolerance
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import backend_class, model_file
from cifarx_serve.devices import Device
from cifarx_serve.errors import CheckFailed
from cifarx_serve.files.atomic import atomic_directory, atomic_path, require_writable, write_error
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import ModelSpec, Precision
from cifarx_serve.system.versions import library_versions
from cifarx_train.checkpoints.checkpoint import SUFFIX as CHECKPOINT_SUFFIX
from cifarx_train.checkpoints.checkpoint import file_sha256, load_checkpoint, weights_sha256
from cifarx_train.data.dataset import OnError
from cifarx_train.models.options import ModelOptions
from cifarx_train.pytorch_backend import PyTorchBackend

CPU = Device("cpu")


class ExportResult(NamedTuple):
    """The result of one export.

    Attributes:
        path: the artifact, which exists only if its parity check passed.
        report: the parity report.
        report_path: the file of the parity report.
    """

    path: Path
    report: ParityReport
    report_path: Path


def export(
    checkpoint: str | Path,
    formats: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    *,
    model: str | None = None,
    data: str = "auto",
    on_error: OnError = "raise",
    out: str | Path | None = None,
    options: ExportOptions = NO_OPTIONS,
    batch_size: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    html_report: str | Path | None = None,
    progress: Progress = silent,
) -> list[ExportResult]:
    """Export a checkpoint to every combination of `formats` and `precisions`, and check the parity of each artifact.

    An artifact that fails its parity check is not written. Its report is, and an earlier artifact of the same name is
    kept.

    Args:
        checkpoint: a checkpoint of `cifarx train`, or a legacy checkpoint.
        formats: names of formats, see `cifarx_export.formats.registry.FORMATS`.
        precisions: fp32, fp16 or int8.
        model: name of the network, for a checkpoint that does not contain it.
        data: images for the parity check: auto, cifar10, builtin, or the path of a folder or `.tar.gz`.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them with a warning.
        out: directory for the artifacts. The default is that of the checkpoint.
        options: options of the conversion.
        batch_size: another batch size to check, in addition to 1, 3 and 64.
        atol, rtol: tolerances to use instead of those of the precision.
        html_report: path of an HTML parity report to write, ending in `.html`.
        progress: called with a line of text at each step.

    Returns:
        One result per combination, in the order of `formats`. Each combination is exported once.

    Raises:
        UsageError: an unknown name, or an option that a format or precision does not support.
        ModelFileError: the checkpoint cannot be read.
        DataError: the images cannot be read, or are too few.
        OutputError: a file cannot be written.
    """
    path = Path(checkpoint)
    wanted = dict.fromkeys((name, precision) for name in formats for precision in precisions)
    chosen = [(name, cast("Precision", precision)) for name, precision in wanted]
    for name, precision in chosen:
        require_supported(name, precision, options)
    require_html_path(html_report)
    tolerances = {precision: get_tolerance(precision, atol, rtol) for _, precision in chosen}
    progress(f"reading {path}")
    loaded = load_checkpoint(path, ModelOptions(model))
    loaded = loaded._replace(training={})  # free the optimizer state, which can be twice as large as the weights
    images = load_parity_data(loaded.spec, data, on_error)
    batch_sizes = parity_batch_sizes(batch_size, len(images.images))
    with PyTorchBackend.from_checkpoint(loaded, CPU) as backend:
        reference = run_reference(backend, images, progress)
    directory = path.parent if out is None else Path(out)
    require_writable(directory)
    sha256 = file_sha256(path)
    base = ConversionSource(
        loaded.build,
        msgspec.structs.replace(
            loaded.spec,
            checkpoint_sha256=sha256,
            weights_sha256=weights_sha256(loaded.weights),
            embedded_preprocessing=bool(options.embed_preprocessing),
        ),
        options,
        lambda count: load_training_images(loaded.spec, data, count, on_error),
        progress,
    )
    sources = {precision: _with_precision(base, precision) for precision in tolerances}
    exporter = _Exporter(path.name, sha256, directory, tolerances, reference, batch_sizes, progress)
    results = [exporter.run(name, sources[precision]) for name, precision in chosen]
    if html_report is not None:
        write_html_report(Path(html_report), [result.report for result in results], images.images)
    return results


def _with_precision(source: ConversionSource, precision: Precision) -> ConversionSource:
    return replace(source, spec=msgspec.structs.replace(source.spec, precision=precision))


class _Exporter(NamedTuple):
    """Writes the artifacts of one checkpoint.

    Attributes:
        checkpoint: file name of the checkpoint.
        checkpoint_sha256: hash of the checkpoint.
        directory: directory for the artifacts.
        tolerances: tolerance of each precision.
        reference: outputs of the checkpoint in PyTorch.
        batch_sizes: batch sizes to check parity at.
        progress: called with a line of text at each step.
    """

    checkpoint: str
    checkpoint_sha256: str
    directory: Path
    tolerances: dict[Precision, Tolerance]
    reference: Reference
    batch_sizes: tuple[int, ...]
    progress: Progress

    def run(self, name: str, source: ConversionSource) -> ExportResult:
        """Export to one format in one precision, and write the parity report."""
        row, precision = get_format(name), source.spec.precision
        stem = self.checkpoint.removesuffix(CHECKPOINT_SUFFIX)
        target = self.directory / row.file_name(stem, precision, source.spec.embedded_preprocessing)
        base_spec = msgspec.structs.replace(source.spec, exporter={"format": name, **library_versions()})
        self.progress(f"converting to {name} {precision}")
        for attempt, artifact in enumerate(_convert(row, source), start=1):
            if attempt > 1:
                self.progress(f"converting to {name} {precision}, attempt {attempt}")
            spec = artifact.complete_spec(base_spec)
            parity = self._write(row, artifact, spec, target)
            if parity.passed:
                break
        return self._report(name, spec, target, parity)

    def _write(self, row: Format, artifact: Artifact, spec: ModelSpec, target: Path) -> ParityResult:
        """Check parity on a temporary file, which is renamed to `target` only if the check passes."""
        try:
            with (atomic_directory if row.directory_suffix else atomic_path)(target) as temporary:
                artifact.save(temporary, spec)
                with backend_class(row.backend)(model_file(temporary), CPU) as backend:
                    tolerance = self.tolerances[spec.precision]
                    parity = check_parity(self.reference, backend, tolerance, self.progress, self.batch_sizes)
                    checked_logits = self._run_first_batch(backend)
                if not parity.passed:
                    raise _ParityFailedError(parity)
                artifact.save(temporary, msgspec.structs.replace(spec, parity=parity.summary))
                write_checksum(model_file(temporary))
                with backend_class(row.backend)(model_file(temporary), CPU) as backend:
                    logits = self._run_first_batch(backend)
                # The file was written again with the parity summary in its spec. It must still be the same model.
                if not np.allclose(logits, checked_logits, rtol=1e-4, atol=1e-4):
                    raise CheckFailed(
                        f"the outputs of {target} changed when its parity summary was embedded", "report this as a bug"
                    )
        except _ParityFailedError as failure:
            return failure.parity
        return parity

    def _run_first_batch(self, backend: Backend) -> NDArray[np.float32]:
        return backend.run(model_input(self.reference.data.images[:EVAL_BATCH_SIZE], backend.spec))

    def _report(self, name: str, spec: ModelSpec, target: Path, parity: ParityResult) -> ExportResult:
        """Write the report. That of a failed check has its own name, since the last good artifact keeps its report."""
        failed_path = target.with_name(target.name + FAILED_SUFFIX)
        path = target.with_name(target.name + SUFFIX) if parity.passed else failed_path
        report = ParityReport(
            artifact=target.name,
            artifact_sha256=file_sha256(model_file(target)) if parity.passed else None,
            checkpoint=self.checkpoint,
            checkpoint_sha256=self.checkpoint_sha256,
            format=name,
            precision=spec.precision,
            checks=parity.checks,
            summary=parity.summary,
            error_analysis=parity.error_analysis,
        )
        report.write(path)
        if parity.passed:
            failed_path.unlink(missing_ok=True)
        return ExportResult(target, report, path)


def _convert(row: Format, source: ConversionSource) -> Iterator[Artifact]:
    """Yield the candidates of a format.

    Raises:
        OutputError: there is no space for temporary files, which some converters need.
    """
    try:
        yield from row.convert(source)
    except OSError as error:
        raise write_error(Path(error.filename or tempfile.gettempdir()), error) from error


class _ParityFailedError(Exception):
    """Discards the temporary file of an artifact that failed its parity check."""

    def __init__(self, parity: ParityResult) -> None:
        self.parity = parity
