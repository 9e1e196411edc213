"""Export: convert, prove, and only then give the artifact its name."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats import ExportOptions, Format, export_format, require_opset
from cifarx_export.gates import Gate, gate
from cifarx_export.parity_report import FAILED_SUFFIX, SUFFIX, ParityReport
from cifarx_export.proof import BATCH_SIZES, Proof, Reference, ask_reference, prove
from cifarx_export.proof_data import proof_data
from cifarx_serve.atomic import atomic_path, require_writable
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import backend_class
from cifarx_serve.devices import Device
from cifarx_serve.errors import CheckFailed, UsageError
from cifarx_serve.preprocess import scale
from cifarx_serve.progress import Progress, silent
from cifarx_serve.versions import library_versions
from cifarx_train.checkpoint import SUFFIX as CHECKPOINT_SUFFIX
from cifarx_train.checkpoint import Checkpoint, file_sha256, load_checkpoint
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
    *,
    model: str | None = None,
    data: str = "auto",
    broken: Broken = "refuse",
    out: str | Path | None = None,
    opset: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    progress: Progress = silent,
) -> list[Exported]:
    """Make artifacts of a checkpoint, beside it or in `out`; an artifact that fails its proof is not left there.

    Args:
        checkpoint: a `.pth` file of `cifarx train`, or of the training notes.
        formats: names from `formats.FORMATS`.
        model: the network's name, for a file that does not say it itself.
        broken: refuse a data set with broken images, or skip them.
        data: the images of the proof: auto, cifar10, builtin, or the path of a folder or `.tar.gz`.
        opset: of the ONNX file.
        atol, rtol: in place of the gate's own.
        progress: told what is being done.

    Raises:
        UsageError, ModelFileError, DataError, OutputError: before anything is made.
    """
    path = Path(checkpoint)
    options = ExportOptions(opset)
    chosen = {name: _require_options(name, export_format(name), options) for name in formats}
    limits = gate("fp32", atol, rtol)
    progress(f"reading {path}")
    loaded = load_checkpoint(path, model)
    folder = path.parent if out is None else Path(out)
    with PyTorchBackend.of(loaded, CPU) as backend:
        reference = ask_reference(backend, proof_data(loaded.spec, data, broken), progress)
    require_writable(folder)
    job = _Job(path, file_sha256(path), loaded, folder, options, limits, reference, progress)
    return [job.make(name, kind) for name, kind in chosen.items()]


def _require_options(name: str, kind: Format, options: ExportOptions) -> Format:
    if options.opset is not None:
        require_opset(options.opset)
    for option, value in options._asdict().items():
        if value is not None and option not in kind.options:
            raise UsageError(f"format {name} has no {option}", f"leave --{option} out, or export {name} on its own")
    return kind


class _Job(NamedTuple):
    """What is the same for every format of one export."""

    path: Path
    sha256: str
    checkpoint: Checkpoint
    folder: Path
    options: ExportOptions
    gate: Gate
    reference: Reference
    progress: Progress

    def make(self, name: str, kind: Format) -> Exported:
        target = self.folder / (self.path.name.removesuffix(CHECKPOINT_SUFFIX) + kind.suffix)
        spec = msgspec.structs.replace(
            self.checkpoint.spec,
            checkpoint_sha256=self.sha256,
            exporter={"format": name, **library_versions()},
        )
        self.progress(f"converting to {name}")
        artifact = kind.convert(self.checkpoint.build(), spec, self.options)
        try:
            with atomic_path(target) as temporary:
                artifact.save(temporary, spec)
                with backend_class(kind.backend)(temporary, CPU) as backend:
                    proof = prove(self.reference, backend, self.gate, self.progress)
                    answer = self._probe(backend)
                if not proof.passed:
                    raise _NotProvedError(proof)
                artifact.save(temporary, msgspec.structs.replace(spec, parity=proof.summary))
                with backend_class(kind.backend)(temporary, CPU) as backend:
                    self._require_same(answer, self._probe(backend), target)
        except _NotProvedError as failure:
            return self._report(name, target, failure.proof, None)
        return self._report(name, target, proof, file_sha256(target))

    def _probe(self, backend: Backend) -> NDArray[np.float32]:
        return backend.run(scale(self.reference.data.images[: BATCH_SIZES[-1]], backend.spec.input))

    def _require_same(self, proved: NDArray[np.float32], sealed: NDArray[np.float32], target: Path) -> None:
        """The file that is named is written anew with its proof inside; it must still be the one that was proved."""
        if not np.allclose(sealed, proved, rtol=self.gate.rtol, atol=self.gate.atol):
            raise CheckFailed(f"{target} answers otherwise once its proof is inside", "report this as a defect")

    def _report(self, name: str, target: Path, proof: Proof, sha256: str | None) -> Exported:
        """A failed proof gets a name of its own: the last good artifact keeps its own beside it."""
        failed = target.with_name(target.name + FAILED_SUFFIX)
        path = target.with_name(target.name + SUFFIX) if proof.passed else failed
        document = ParityReport(
            artifact=target.name,
            artifact_sha256=sha256,
            checkpoint=self.path.name,
            checkpoint_sha256=self.sha256,
            format=name,
            precision="fp32",
            checks=proof.checks,
            summary=proof.summary,
            worst=proof.worst,
        )
        document.write(path)
        if proof.passed:
            failed.unlink(missing_ok=True)
        return Exported(target, document, path)


class _NotProvedError(Exception):
    """Ends the writing of an artifact whose proof failed."""

    def __init__(self, proof: Proof) -> None:
        self.proof = proof
