"""One network with its reference, ready to be exported to any number of artifacts that are checked against it."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from cifarx_export.checked_artifact import ArtifactWriter, ExportResult
from cifarx_export.formats.determinism import require_deterministic
from cifarx_export.formats.registry import (
    NO_OPTIONS,
    PRECISIONS,
    Artifact,
    ConversionSource,
    ExportOptions,
    Format,
    example_input,
    get_format,
)
from cifarx_export.origin import Origin, open_origin, require_convertible
from cifarx_export.parity.assumed_preprocessing import require_no_better_preprocessing
from cifarx_export.parity.chance import require_better_than_chance
from cifarx_export.parity.compare import Reference, parity_batch_sizes, run_reference
from cifarx_export.parity.data import load_parity_data, load_training_images, name_classes
from cifarx_export.parity.stated_output import require_stated_output
from cifarx_export.parity.tolerances import Tolerance, get_tolerance
from cifarx_serve.backends.base import Backend
from cifarx_serve.errors import OutputError, error_message
from cifarx_serve.files.atomic import require_writable, write_error
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import ModelSpec, Precision
from cifarx_serve.system.versions import library_versions
from cifarx_train.data.dataset import OnError
from cifarx_train.data.selection import DataSource
from cifarx_train.models.description import describe_model
from cifarx_train.models.options import ModelOptions

if TYPE_CHECKING:
    from torch import nn

NO_FACTS: Final[Mapping[str, str]] = MappingProxyType({})


class Exporter(NamedTuple):
    """Exports one network.

    Attributes:
        origin: the network.
        directory: directory for artifacts that are named after the origin.
        sources: input of the converters, by precision.
        tolerances: tolerance of each precision.
        writer: checks the artifacts and writes them.
        facts: facts about the export that the specs record.
    """

    origin: Origin
    directory: Path
    sources: Mapping[Precision, ConversionSource]
    tolerances: Mapping[Precision, Tolerance]
    writer: ArtifactWriter
    facts: Mapping[str, str]

    @property
    def reference(self) -> Reference:
        """The reference of the artifacts."""
        return self.writer.reference

    def path(self, name: str, precision: Precision) -> Path:
        """Return the path of an artifact that is named after the origin."""
        embedded = self.sources[precision].spec.embedded_preprocessing
        return self.directory / get_format(name).file_name(self.origin.stem, precision, embedded)

    def run(
        self, name: str, precision: Precision, path: Path | None = None, facts: Mapping[str, str] = NO_FACTS
    ) -> ExportResult:
        """Export to one format in one precision, and write the parity report.

        Args:
            name: name of the format.
            precision: the precision.
            path: path of the artifact. The default is named after the origin.
            facts: more facts about the export that the spec records.
        """
        row, source = get_format(name), self.sources[precision]
        target = path or self.path(name, precision)
        exporter = {"format": name, **self.facts, **facts, **library_versions()}
        base_spec = msgspec.structs.replace(source.spec, exporter=exporter)
        source.progress(f"converting to {name} {precision}")
        for attempt, artifact in enumerate(_convert(row, source), start=1):
            if attempt > 1:
                source.progress(f"converting to {name} {precision}, attempt {attempt}")
            spec = artifact.complete_spec(base_spec)
            parity = self.writer.write(row, artifact, spec, target, self.tolerances[precision])
            if parity.passed:
                break
        return self.writer.report(name, spec, target, parity)

    def with_module(self, build_module: "Callable[[], nn.Module]", facts: Mapping[str, str]) -> "Exporter":
        """Return an exporter of other weights for the same network, checked against the same reference.

        Args:
            build_module: returns a new copy of the network with the other weights.
            facts: facts about the weights that the specs record.
        """
        sources = {
            precision: replace(
                source,
                build_module=build_module,
                original=source.build_module,
                spec=msgspec.structs.replace(source.spec, weights_sha256=None),
            )
            for precision, source in self.sources.items()
        }
        return self._replace(sources=sources, facts={**self.facts, **facts})

    def with_network(
        self,
        build_module: "Callable[[], nn.Module]",
        reference: Reference,
        name: str,
        warning: str,
        facts: Mapping[str, str],
    ) -> "Exporter":
        """Return an exporter of another network with the same input and output, which is its own reference.

        Args:
            build_module: returns a new copy of the other network.
            reference: its outputs.
            name: its name, for reports.
            warning: what the parity checks warn of: that the reference is not the network of the file.
            facts: facts about it that the specs record.
        """
        changed = self.with_module(build_module, facts)
        sources = {
            precision: replace(source, original=None, spec=_without_results(source.spec))
            for precision, source in changed.sources.items()
        }
        writer = self.writer._replace(origin=name, reference=reference, warnings=(*self.writer.warnings, warning))
        return changed._replace(sources=sources, writer=writer)


def _without_results(spec: ModelSpec) -> ModelSpec:
    """Return a spec without the accuracies of training, which another network does not have."""
    if spec.training is None:
        return spec
    training = msgspec.structs.replace(
        spec.training, test_accuracy=None, test_loss=None, val_accuracy=None, val_loss=None
    )
    return msgspec.structs.replace(spec, training=training)


def open_exporter(
    source: "Path | nn.Module | None",
    stated: ModelOptions,
    directory: Path,
    *,
    pairs: Sequence[tuple[str, Precision]] = (),
    data: str | DataSource = "auto",
    on_error: OnError = "raise",
    options: ExportOptions = NO_OPTIONS,
    batch_size: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    allow_chance_accuracy: bool = False,
    progress: Progress = silent,
) -> Exporter:
    """Open a network, load the images of its parity checks, and run the reference on them.

    Args:
        source: see `open_origin`.
        stated: what the user states about the network.
        directory: directory for artifacts that are named after the origin.
        pairs: formats and precisions that must be possible; they are checked before any long work.
        data, on_error, options, batch_size, atol, rtol, allow_chance_accuracy, progress: see
            `cifarx_export.export.export`.

    Raises:
        CifarxError: see `cifarx_export.export.export`.
    """
    progress(f"reading {stated.model if source is None else source if isinstance(source, Path) else 'the module'}")
    opened = open_origin(source, stated)
    origin = opened._replace(spec=name_classes(opened.spec, data, on_error))
    for name, precision in pairs:
        require_convertible(origin, name, precision, options)
    if origin.load_onnx is None:
        require_deterministic(origin.build_module(), example_input(origin.spec))
    if not origin.trained_here:
        origins = stated.origins
        if origin.spec.class_names != opened.spec.class_names:
            origins["class_names"] = f"--data {data}"
        for line in describe_model(origin.spec, opened.name, origins):
            progress(line)
    tolerances: dict[Precision, Tolerance] = {
        precision: get_tolerance(precision, atol, rtol, origin.spec.output) for precision in PRECISIONS
    }
    images = load_parity_data(origin.spec, data, on_error)
    batch_sizes = parity_batch_sizes(batch_size, len(images.images))
    with origin.open() as backend:
        reference = run_reference(backend, images, progress)._replace(spec=origin.spec)
        _require_plausible(origin, backend, reference, allow_chance_accuracy, progress)
    require_writable(directory)
    base = ConversionSource(
        origin.build_module,
        msgspec.structs.replace(origin.spec, embedded_preprocessing=bool(options.embed_preprocessing)),
        options,
        lambda count: load_training_images(origin.spec, data, count, on_error, images),
        progress,
        origin.load_onnx,
        images.images,
    )
    sources = {
        precision: replace(base, spec=msgspec.structs.replace(base.spec, precision=precision))
        for precision in tolerances
    }
    writer = ArtifactWriter(origin.name, origin.sha256, reference, batch_sizes, progress)
    facts = {} if origin.spec == opened.spec else {"class names": f"of the dataset {images.name}"}
    return Exporter(origin, directory, sources, tolerances, writer, facts)


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
