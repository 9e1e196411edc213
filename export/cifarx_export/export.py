"""Export: convert, check parity, and only then give the artifact its name."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.registry import (
    ATTEMPTS,
    NO_OPTIONS,
    Artifact,
    ExportOptions,
    Format,
    Source,
    export_format,
    require_supported,
)
from cifarx_export.parity.compare import WHOLE_BATCH, Proof, Reference, check_parity, proved_batch_sizes, run_reference
from cifarx_export.parity.data import parity_data, training_images
from cifarx_export.parity.html import require_page, write_parity_page
from cifarx_export.parity.report import FAILED_SUFFIX, SUFFIX, ParityReport
from cifarx_export.parity.tolerances import Tolerance, gate
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import backend_class
from cifarx_serve.devices import Device
from cifarx_serve.errors import CheckFailed
from cifarx_serve.files.atomic import atomic_folder, atomic_path, cannot_write, require_writable
from cifarx_serve.files.checksum import seal
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import ModelSpec, Precision
from cifarx_serve.system.versions import library_versions
from cifarx_train.checkpoints.checkpoint import SUFFIX as CHECKPOINT_SUFFIX
from cifarx_train.checkpoints.checkpoint import Checkpoint, file_sha256, load_checkpoint, weights_sha256
from cifarx_train.data.dataset import Broken
from cifarx_train.pytorch_backend import PyTorchBackend

CPU = Device("cpu")


class Exported(NamedTuple):
    """One artifact and its proof; the file is there only where the proof passed."""

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
    broken: Broken = "refuse",
    out: str | Path | None = None,
    options: ExportOptions = NO_OPTIONS,
    batch: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    page: str | Path | None = None,
    progress: Progress = silent,
) -> list[Exported]:
    """Make artifacts of a checkpoint, beside it or in `out`; an artifact that fails its proof is not left there.

    Args:
        checkpoint: a `.pth` file of `cifarx train`, or of the training notes.
        formats: names from `formats.FORMATS`.
        precisions: fp32, fp16, int8; every format is made in each.
        model: the network's name, for a file that does not say it itself.
        data: the images of the proof: auto, cifar10, builtin, or the path of a folder or `.tar.gz`.
        broken: refuse a data set with broken images, or skip them.
        out: the folder for the artifacts.
        options: of the conversion.
        batch: the largest batch size to check_parity, beside 1, 3 and 64.
        atol, rtol: in place of the gate's own.
        page: write the proofs there as a page, `.html`.
        progress: told what is being done.

    Raises:
        UsageError, ModelFileError, DataError, OutputError: before anything is made.
    """
    path = Path(checkpoint)
    wanted = dict.fromkeys((name, precision) for name in formats for precision in precisions)
    chosen = [(name, cast("Precision", precision)) for name, precision in wanted]
    for name, precision in chosen:
        require_supported(name, precision, options)
    require_page(page)
    tolerances = {precision: gate(precision, atol, rtol) for _, precision in chosen}
    progress(f"reading {path}")
    loaded = load_checkpoint(path, model)._replace(training={})  # the optimizer's state may be twice the weights
    folder = path.parent if out is None else Path(out)
    images = parity_data(loaded.spec, data, broken)
    batch_sizes = proved_batch_sizes(batch, len(images.images))
    with PyTorchBackend.of(loaded, CPU) as backend:
        reference = run_reference(backend, images, progress)
    require_writable(folder)
    origin = _Origin(path, file_sha256(path), weights_sha256(loaded.model), loaded, data, broken)
    job = _Job(origin, folder, options, tolerances, reference, batch_sizes, progress, {})
    made = [job.make(name, export_format(name), precision) for name, precision in chosen]
    if page is not None:
        write_parity_page(Path(page), [artifact.report for artifact in made], images.images)
    return made


class _Origin(NamedTuple):
    """Where every artifact of one export comes from."""

    path: Path
    sha256: str
    weights_sha256: str
    checkpoint: Checkpoint
    data: str
    broken: Broken

    def training_images(self, count: int) -> NDArray[np.uint8]:
        return training_images(self.checkpoint.spec, self.data, count, self.broken)


class _Job(NamedTuple):
    """What is the same for every artifact of one export."""

    origin: _Origin
    folder: Path
    options: ExportOptions
    tolerances: dict[Precision, Tolerance]
    reference: Reference
    batch_sizes: tuple[int, ...]
    progress: Progress
    kept: dict[Precision, dict[str, Any]]

    def make(self, name: str, kind: Format, precision: Precision) -> Exported:
        stem = self.origin.path.name.removesuffix(CHECKPOINT_SUFFIX)
        target = self.folder / kind.file_name(stem, precision, bool(self.options.embed_preprocessing))
        kept = self.kept.setdefault(precision, {})
        for attempt in range(ATTEMPTS[precision]):
            again = f", attempt {attempt + 1}" if attempt else ""
            self.progress(f"converting to {name} {precision}{again}")
            spec, proof = self._try(kind, target, self._start(name, precision, kept, attempt))
            if proof.passed:
                return self._report(name, spec, target, proof, file_sha256(kind.model_file(target)))
        return self._report(name, spec, target, proof, None)

    def _try(self, kind: Format, target: Path, source: Source) -> tuple[ModelSpec, Proof]:
        """Convert and check parity; the artifact has its name where the proof passed."""
        artifact = _convert(kind, source)
        spec = artifact.describe(source.spec)
        try:
            with (atomic_folder if kind.model else atomic_path)(target) as temporary:
                artifact.save(temporary, spec)
                with backend_class(kind.backend)(kind.model_file(temporary), CPU) as backend:
                    limits = self.tolerances[spec.precision]
                    proof = check_parity(self.reference, backend, limits, self.progress, self.batch_sizes)
                    answer = self._probe(backend)
                if not proof.passed:
                    raise _NotProvedError(proof)
                artifact.save(temporary, msgspec.structs.replace(spec, parity=proof.summary))
                seal(kind.model_file(temporary))
                with backend_class(kind.backend)(kind.model_file(temporary), CPU) as backend:
                    self._require_same(answer, self._probe(backend), target)
        except _NotProvedError as failure:
            return spec, failure.proof
        return spec, proof

    def _start(self, name: str, precision: Precision, kept: dict[str, Any], attempt: int) -> Source:
        origin = self.origin
        spec = msgspec.structs.replace(
            origin.checkpoint.spec,
            checkpoint_sha256=origin.sha256,
            weights_sha256=origin.weights_sha256,
            precision=precision,
            embedded_preprocessing=bool(self.options.embed_preprocessing),
            exporter={"format": name, **library_versions()},
        )
        module = origin.checkpoint.build()
        return Source(module, spec, self.options, origin.training_images, self.progress, kept, attempt)

    def _probe(self, backend: Backend) -> NDArray[np.float32]:
        return backend.run(model_input(self.reference.data.images[:WHOLE_BATCH], backend.spec))

    def _require_same(self, proved: NDArray[np.float32], sealed: NDArray[np.float32], target: Path) -> None:
        """The file that is named is written anew with its proof inside; it must still be the one that was proved."""
        if not np.allclose(sealed, proved, rtol=1e-4, atol=1e-4):
            raise CheckFailed(f"{target} answers otherwise once its proof is inside", "report this as a defect")

    def _report(self, name: str, spec: ModelSpec, target: Path, proof: Proof, sha256: str | None) -> Exported:
        """A failed proof gets a name of its own: the last good artifact keeps its own beside it."""
        failed = target.with_name(target.name + FAILED_SUFFIX)
        path = target.with_name(target.name + SUFFIX) if proof.passed else failed
        document = ParityReport(
            artifact=target.name,
            artifact_sha256=sha256,
            checkpoint=self.origin.path.name,
            checkpoint_sha256=self.origin.sha256,
            format=name,
            precision=spec.precision,
            checks=proof.checks,
            summary=proof.summary,
            evidence=proof.evidence,
        )
        document.write(path)
        if proof.passed:
            failed.unlink(missing_ok=True)
        return Exported(target, document, path)


def _convert(kind: Format, source: Source) -> Artifact:
    """Some conversions go by way of temporary files.

    Raises:
        OutputError: there is no room for them.
    """
    try:
        return kind.convert(source)
    except OSError as error:
        raise cannot_write(Path(error.filename or tempfile.gettempdir()), error) from error


class _NotProvedError(Exception):
    """Ends the writing of an artifact whose proof failed."""

    def __init__(self, proof: Proof) -> None:
        self.proof = proof
