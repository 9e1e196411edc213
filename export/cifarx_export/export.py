"""Export a checkpoint: convert it, check parity, and give an artifact its name only if the parity check passed."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.checked_artifact import ArtifactWriter, ExportResult
from cifarx_export.formats.determinism import require_deterministic
from cifarx_export.formats.registry import (
    NO_OPTIONS,
    Artifact,
    ConversionSource,
    ExportOptions,
    Format,
    example_input,
    get_format,
)
from cifarx_export.origin import Origin, open_origin, origin_directory, require_convertible
from cifarx_export.parity.assumed_preprocessing import require_no_better_preprocessing
from cifarx_export.parity.chance import require_better_than_chance
from cifarx_export.parity.compare import Reference, parity_batch_sizes, run_reference
from cifarx_export.parity.data import load_parity_data, load_training_images, name_classes
from cifarx_export.parity.html import render_html_report, require_html_path, write_html_report
from cifarx_export.parity.stated_output import require_stated_output
from cifarx_export.parity.tolerances import Tolerance, get_tolerance
from cifarx_export.targets import find_targets
from cifarx_serve.backends.base import Backend
from cifarx_serve.errors import OutputError, UsageError, error_message
from cifarx_serve.files.atomic import require_writable, write_error
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec, Precision
from cifarx_serve.system.terminal import require_utf8
from cifarx_serve.system.versions import library_versions
from cifarx_train.data.dataset import OnError
from cifarx_train.data.selection import DataSource
from cifarx_train.models.description import describe_model
from cifarx_train.models.options import ModelOptions, SpecOverrides

if TYPE_CHECKING:
    from torch import nn


class ExportResults(list[ExportResult]):
    """The results of an export. In a notebook, they show themselves as the HTML parity report.

    Args:
        results: the results.
        images: the worst images of the parity checks, by their position.
    """

    def __init__(self, results: Iterable[ExportResult], images: Mapping[int, NDArray[np.uint8]]) -> None:
        super().__init__(results)
        self._images = images

    def _repr_html_(self) -> str:
        page = render_html_report([result.report for result in self], self._images)
        return f'<iframe srcdoc="{escape(page)}" style="border: 0; width: 100%; height: 40rem"></iframe>'


def export(
    checkpoint: "str | Path | nn.Module | None",
    formats: Sequence[str] | Path = ("onnx",),
    precisions: Sequence[str] | None = None,
    *,
    model: str | ModelOptions | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: InputSpec | None = None,
    data: str | DataSource = "auto",
    on_error: OnError = "raise",
    out: str | Path | None = None,
    options: ExportOptions = NO_OPTIONS,
    batch_size: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    html_report: str | Path | None = None,
    allow_chance_accuracy: bool = False,
    progress: Progress = silent,
) -> ExportResults:
    """Export a network to every combination of `formats` and `precisions`, and check the parity of each artifact.

    An artifact that fails its parity check is not written. Its report is, and an earlier artifact of the same name is
    kept.

    Args:
        checkpoint: a checkpoint; an ONNX file of `cifarx export` or `cifarx adopt` in fp32; a directory that Hugging
            Face's `save_pretrained` wrote; or a module in memory, which is not changed. None for a network that `model`
            names with its weights, such as `hf/DIRECTORY`.
        formats: names of formats, see `cifarx_export.formats.registry.FORMATS`; or the path of one artifact, whose
            suffix names the format, such as `net.onnx` or `net.int8.onnx`.
        precisions: fp32, bf16, fp16 or int8. The default is fp32, or the one in the path.
        model: the network, as `--model` names it, for a checkpoint that does not contain it; or `ModelOptions` with all
            that the user states.
        class_names: the classes in the order of their labels. The default is what the checkpoint states.
        preprocessing: how images become the input of the network, see `cifarx.Preprocessing`.
        data: images for the parity check: auto, cifar10, builtin, or the path of images; or a `DataSource` that says
            how they are split and labeled.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them with a warning.
        out: directory for the artifacts. The default is that of the checkpoint, or the current one.
        options: options of the conversion.
        batch_size: another batch size to check, in addition to 1, 3 and 64.
        atol, rtol: tolerances to use instead of those of the precision.
        html_report: path of an HTML parity report to write, ending in `.html`.
        allow_chance_accuracy: also export a network that is no better than chance on labeled images, or better with
            another preprocessing than the one that is assumed.
        progress: called with a line of text at each step.

    Returns:
        One result per combination, in the order of `formats`. Each combination is exported once. In a notebook, the
        list shows the HTML parity report.

    Raises:
        UsageError: an unknown name, or an option that a format or precision does not support.
        ModelFileError: the checkpoint cannot be read.
        SpecError: what is stated about the network is not valid.
        CheckFailed: the network is no better than chance, and its preprocessing or classes were given or assumed; or
            another preprocessing than the assumed one is better; or it returns probabilities where logits are assumed.
        DataError: the images cannot be read, or are too few.
        OutputError: a file cannot be written.
    """
    source = Path(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    targets = find_targets(formats, precisions, options)
    if targets.path is not None and out is not None:
        raise UsageError(f"{targets.path} and out={out} were given together", "leave one of them out")
    require_html_path(html_report)
    require_utf8(*(path for path in (source, targets.path, out) if isinstance(path, str | Path)))  # named in reports
    stated = _model_options(model, class_names, preprocessing)
    progress(f"reading {stated.model if source is None else source if isinstance(source, Path) else 'the module'}")
    opened = open_origin(source, stated)
    origin = opened._replace(spec=name_classes(opened.spec, data, on_error))
    for name, precision in targets.pairs:
        require_convertible(origin, name, precision, options)
    if origin.load_onnx is None:
        require_deterministic(origin.build_module(), example_input(origin.spec))
    if not origin.trained_here:
        origins = stated.origins
        if origin.spec.class_names != opened.spec.class_names:
            origins["class_names"] = f"--data {data}"
        for line in describe_model(origin.spec, opened.name, origins):
            progress(line)
    tolerances = {
        precision: get_tolerance(precision, atol, rtol, origin.spec.output) for precision in targets.precisions
    }
    images = load_parity_data(origin.spec, data, on_error)
    batch_sizes = parity_batch_sizes(batch_size, len(images.images))
    with origin.open() as backend:
        reference = run_reference(backend, images, progress)._replace(spec=origin.spec)
        _require_plausible(origin, backend, reference, allow_chance_accuracy, progress)
    directory = origin_directory(source, stated) if out is None else Path(out)
    require_writable(directory if targets.path is None else targets.path.parent)
    base = ConversionSource(
        origin.build_module,
        msgspec.structs.replace(origin.spec, embedded_preprocessing=bool(options.embed_preprocessing)),
        options,
        lambda count: load_training_images(origin.spec, data, count, on_error, images),
        progress,
        origin.load_onnx,
        images.images,
    )
    sources = {precision: _with_precision(base, precision) for precision in tolerances}
    writer = ArtifactWriter(origin.name, origin.sha256, reference, batch_sizes, progress)
    facts = {} if origin.spec == opened.spec else {"class names": f"of the dataset {images.name}"}
    exporter = _Exporter(origin, directory, targets.path, tolerances, writer, facts)
    results = [exporter.run(name, sources[precision]) for name, precision in targets.pairs]
    if html_report is not None:
        write_html_report(Path(html_report), [result.report for result in results], images.images)
    analyses = [result.report.error_analysis for result in results]
    worst = {row.image for analysis in analyses if analysis for row in analysis.worst}
    return ExportResults(results, {position: np.array(images.images[position]) for position in worst})


def _require_plausible(
    origin: Origin, backend: Backend, reference: Reference, allowed: bool, progress: Progress
) -> None:
    """Refuse what is likely a wrong assumption about the network: its output, preprocessing or classes.

    Raises:
        CheckFailed: see the checks.
    """
    require_stated_output(reference, origin.name, is_stated=origin.states_output)
    require_better_than_chance(
        reference, origin.name, trained_here=origin.trained_here, allowed=allowed, progress=progress
    )
    if not (origin.trained_here or allowed):
        require_no_better_preprocessing(backend, reference, origin.name, progress)


def _model_options(
    model: str | ModelOptions | None, class_names: Sequence[str] | None, preprocessing: InputSpec | None
) -> ModelOptions:
    """Return what the arguments of `export` state about the network."""
    options = model if isinstance(model, ModelOptions) else ModelOptions(model)
    fields, origins = dict(options.overrides.fields), dict(options.overrides.origins)
    if class_names is not None:
        fields["class_names"], origins["class_names"] = list(class_names), "class_names"
    if preprocessing is not None:
        fields["input"], origins["input"] = msgspec.to_builtins(preprocessing), "preprocessing"
    whole_input = options.overrides.whole_input or preprocessing is not None
    return options._replace(overrides=SpecOverrides(fields, whole_input, origins))


def _with_precision(source: ConversionSource, precision: Precision) -> ConversionSource:
    return replace(source, spec=msgspec.structs.replace(source.spec, precision=precision))


class _Exporter(NamedTuple):
    """Exports one network.

    Attributes:
        origin: the network.
        directory: directory for the artifacts.
        path: path of the only artifact, or None for names after the origin.
        tolerances: tolerance of each precision.
        writer: checks the artifacts and writes them.
        facts: facts about the export that the spec records.
    """

    origin: Origin
    directory: Path
    path: Path | None
    tolerances: dict[Precision, Tolerance]
    writer: ArtifactWriter
    facts: Mapping[str, str]

    def run(self, name: str, source: ConversionSource) -> ExportResult:
        """Export to one format in one precision, and write the parity report."""
        row, precision = get_format(name), source.spec.precision
        name_of_file = row.file_name(self.origin.stem, precision, source.spec.embedded_preprocessing)
        target = self.path or self.directory / name_of_file
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
        temporary = tempfile.gettempdir()
        if error.filename and not Path(error.filename).is_relative_to(temporary):
            raise write_error(Path(error.filename), error) from error
        problem = f"cannot write temporary files to {temporary} ({error_message(error)})"
        raise OutputError(problem, "free some space, or set TMPDIR to another directory") from error
