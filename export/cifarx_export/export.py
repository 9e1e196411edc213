"""Export a checkpoint: convert it, check parity, and give an artifact its name only if the parity check passed."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from cifarx_export.checked_artifact import ArtifactWriter, ExportResult
from cifarx_export.formats.registry import (
    NO_OPTIONS,
    Artifact,
    ConversionSource,
    ExportOptions,
    Format,
    get_format,
    require_supported,
)
from cifarx_export.origin import Origin, open_origin, require_convertible
from cifarx_export.parity.chance import require_better_than_chance
from cifarx_export.parity.compare import parity_batch_sizes, run_reference
from cifarx_export.parity.data import load_parity_data, load_training_images, name_classes
from cifarx_export.parity.html import require_html_path, write_html_report
from cifarx_export.parity.tolerances import Tolerance, get_tolerance
from cifarx_serve.files.atomic import require_writable, write_error
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import Precision
from cifarx_serve.system.terminal import require_utf8
from cifarx_serve.system.versions import library_versions
from cifarx_train.data.dataset import OnError
from cifarx_train.models.options import ModelOptions


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
    allow_chance_accuracy: bool = False,
    progress: Progress = silent,
) -> list[ExportResult]:
    """Export a checkpoint to every combination of `formats` and `precisions`, and check the parity of each artifact.

    An artifact that fails its parity check is not written. Its report is, and an earlier artifact of the same name is
    kept.

    Args:
        checkpoint: a checkpoint, or an ONNX file of `cifarx export` or `cifarx adopt` in fp32.
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
        allow_chance_accuracy: also export a network that is no better than chance on labeled images.
        progress: called with a line of text at each step.

    Returns:
        One result per combination, in the order of `formats`. Each combination is exported once.

    Raises:
        UsageError: an unknown name, or an option that a format or precision does not support.
        ModelFileError: the checkpoint cannot be read.
        CheckFailed: the network is no better than chance, and its preprocessing or classes were given or assumed.
        DataError: the images cannot be read, or are too few.
        OutputError: a file cannot be written.
    """
    path = Path(checkpoint)
    wanted = dict.fromkeys((name, precision) for name in formats for precision in precisions)
    chosen = [(name, cast("Precision", precision)) for name, precision in wanted]
    for name, precision in chosen:
        require_supported(name, precision, options)
    require_html_path(html_report)
    require_utf8(checkpoint, out)  # the report and the specs name them
    progress(f"reading {path}")
    opened = open_origin(path, ModelOptions(model))
    origin = opened._replace(spec=name_classes(opened.spec, data, on_error))
    for name, precision in chosen:
        require_convertible(origin, name, precision, options)
    tolerances = {precision: get_tolerance(precision, atol, rtol, origin.spec.output) for _, precision in chosen}
    images = load_parity_data(origin.spec, data, on_error)
    batch_sizes = parity_batch_sizes(batch_size, len(images.images))
    with origin.open() as backend:
        reference = run_reference(backend, images, progress)._replace(spec=origin.spec)
    require_better_than_chance(
        reference, origin.name, trained_here=origin.trained_here, allowed=allow_chance_accuracy, progress=progress
    )
    directory = path.parent if out is None else Path(out)
    require_writable(directory)
    base = ConversionSource(
        origin.build_module,
        msgspec.structs.replace(origin.spec, embedded_preprocessing=bool(options.embed_preprocessing)),
        options,
        lambda count: load_training_images(origin.spec, data, count, on_error),
        progress,
        origin.load_onnx,
        images.images,
    )
    sources = {precision: _with_precision(base, precision) for precision in tolerances}
    writer = ArtifactWriter(origin.name, origin.sha256, reference, batch_sizes, progress)
    facts = {} if origin.spec == opened.spec else {"class names": f"of the dataset {images.name}"}
    exporter = _Exporter(origin, directory, tolerances, writer, facts)
    results = [exporter.run(name, sources[precision]) for name, precision in chosen]
    if html_report is not None:
        write_html_report(Path(html_report), [result.report for result in results], images.images)
    return results


def _with_precision(source: ConversionSource, precision: Precision) -> ConversionSource:
    return replace(source, spec=msgspec.structs.replace(source.spec, precision=precision))


class _Exporter(NamedTuple):
    """Exports one network.

    Attributes:
        origin: the network.
        directory: directory for the artifacts.
        tolerances: tolerance of each precision.
        writer: checks the artifacts and writes them.
        facts: facts about the export that the spec records.
    """

    origin: Origin
    directory: Path
    tolerances: dict[Precision, Tolerance]
    writer: ArtifactWriter
    facts: Mapping[str, str]

    def run(self, name: str, source: ConversionSource) -> ExportResult:
        """Export to one format in one precision, and write the parity report."""
        row, precision = get_format(name), source.spec.precision
        target = self.directory / row.file_name(self.origin.stem, precision, source.spec.embedded_preprocessing)
        base_spec = msgspec.structs.replace(source.spec, exporter={"format": name, **self.facts, **library_versions()})
        source.progress(f"converting to {name} {precision}")
        for attempt, artifact in enumerate(_convert(row, source), start=1):
            if attempt > 1:
                source.progress(f"converting to {name} {precision}, attempt {attempt}")
            spec = artifact.complete_spec(base_spec)
            parity = self.writer.write(row, artifact, spec, target, self.tolerances[precision])
            if parity.passed:
                break
        return self.writer.report(name, spec, target, parity)


def _convert(row: Format, source: ConversionSource) -> Iterator[Artifact]:
    """Yield the candidates of a format.

    Raises:
        OutputError: there is no space for temporary files, which some converters need.
    """
    try:
        yield from row.convert(source)
    except OSError as error:
        raise write_error(Path(error.filename or tempfile.gettempdir()), error) from error
