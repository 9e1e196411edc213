"""Give an artifact its name only if its parity check passed, and write the report of the check."""

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.registry import Artifact, Format
from cifarx_export.parity.compare import EVAL_BATCH_SIZE, ParityResult, Reference, check_parity
from cifarx_export.parity.report import FAILED_SUFFIX, SUFFIX, ParityReport
from cifarx_export.parity.tolerances import Tolerance
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import backend_class, model_file
from cifarx_serve.devices import Device
from cifarx_serve.errors import CheckFailed
from cifarx_serve.files.atomic import atomic_directory, atomic_path
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.progress import Progress
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import file_sha256

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


class ArtifactWriter(NamedTuple):
    """Writes artifacts that are compared with the same reference.

    Attributes:
        origin: file name of the reference.
        origin_sha256: hash of that file.
        reference: its outputs.
        batch_sizes: batch sizes to check parity at.
        progress: called with a line of text at each step.
        warnings: what every parity check warns of.
    """

    origin: str
    origin_sha256: str
    reference: Reference
    batch_sizes: tuple[int, ...]
    progress: Progress
    warnings: tuple[str, ...] = ()

    def write(
        self, row: Format, artifact: Artifact, spec: ModelSpec, target: Path, tolerance: Tolerance
    ) -> ParityResult:
        """Check parity on a temporary file, which is renamed to `target` only if the check passes."""
        try:
            with (atomic_directory if row.directory_suffix else atomic_path)(target) as temporary:
                artifact.save(temporary, spec)
                with backend_class(row.backend)(model_file(temporary), CPU) as backend:
                    compared = check_parity(self.reference, backend, tolerance, self.progress, self.batch_sizes)
                    parity = self._with_warnings(compared.with_checks(artifact.checks), spec)
                    checked_logits = self._run_first_batch(backend) if parity.passed else None
                if checked_logits is None:
                    raise _ParityFailedError(parity.renamed(model_file(temporary), target.name))
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

    def _with_warnings(self, parity: ParityResult, spec: ModelSpec) -> ParityResult:
        """Add the warnings of the writer, and one if the artifact was calibrated on images of its own check."""
        for warning in self.warnings:
            parity = parity.with_warning(warning)
        if spec.precision != "int8" or not self.reference.data.shares_calibration:
            return parity
        return parity.with_warning("int8 was calibrated on images of this check: there are too few other ones")

    def _run_first_batch(self, backend: Backend) -> NDArray[np.float32]:
        return backend.run(model_input(self.reference.data.images[:EVAL_BATCH_SIZE], backend.spec))

    def report(self, name: str, spec: ModelSpec, target: Path, parity: ParityResult) -> ExportResult:
        """Write the report. That of a failed check has its own name, since the last good artifact keeps its report.

        Args:
            name: name of the format.
            spec: spec of the artifact.
            target: path of the artifact.
            parity: from `write`.
        """
        failed_path = target.with_name(target.name + FAILED_SUFFIX)
        path = target.with_name(target.name + SUFFIX) if parity.passed else failed_path
        report = ParityReport(
            artifact=target.name,
            artifact_sha256=file_sha256(model_file(target)) if parity.passed else None,
            checkpoint=self.origin,
            checkpoint_sha256=self.origin_sha256,
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


class _ParityFailedError(Exception):
    """Discards the temporary file of an artifact that failed its parity check."""

    def __init__(self, parity: ParityResult) -> None:
        self.parity = parity
