"""Makes, proves and measures the candidates of one network, and writes the pick."""

import shutil
import time
from pathlib import Path
from typing import Final

import msgspec

from cifarx_export.checked_artifact import CPU, ExportResult
from cifarx_export.exporter import Exporter
from cifarx_export.formats.registry import NO_OPTIONS, get_format
from cifarx_export.optimization.candidates import BASELINE, Candidate
from cifarx_export.optimization.fine_tuned_weights import load_or_fine_tune
from cifarx_export.optimization.measurement import measure
from cifarx_export.optimization.pruned_network import PrunedExporter, open_pruned_exporter
from cifarx_export.optimization.results import CandidateResult, Measurement
from cifarx_export.optimization.study import FINE_TUNED, Study, installed_version
from cifarx_export.origin import require_convertible
from cifarx_export.parity.compare import EVAL_BATCH_SIZE, check_parity
from cifarx_export.parity.predictions import best_classes
from cifarx_serve.backends.registry import backend_class, model_file, read_spec
from cifarx_serve.errors import CheckFailed, CifarxError
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.progress import Progress
from cifarx_serve.spec import ParitySummary
from cifarx_train.checkpoints.checkpoint import file_sha256

_FINE_TUNED: Final = "tuned"
"""Part of the names of candidates with fine-tuned weights."""

_PRUNED: Final = "pruned"
"""Part of the names of candidates with fewer channels, before the share in percent."""

_PICK: Final = "optimized"
"""Part of the name of the pick's file, as in `lzh_9.optimized.onnx`, and the fact in its spec with the reason."""


class Workbench:
    """Does the work of a search.

    Args:
        exporter: exports the network; its directory is where the pick is written.
        study: where the candidates are written.
        given: the file of the network.
        pruning_seconds: limit for the time to fine-tune a pruned network.
        progress: called with a line of text at each step.
    """

    def __init__(
        self, exporter: Exporter, study: Study, given: Path, pruning_seconds: float, progress: Progress
    ) -> None:
        self._exporter = exporter
        self._study = study
        self._given = given
        self._pruning_seconds = pruning_seconds
        self._progress = progress
        self._fine_tuned: Exporter | None = None
        self._pruned: dict[float, PrunedExporter] = {}

    @property
    def has_module(self) -> bool:
        """Whether the network is one of PyTorch, which can be fine-tuned."""
        return self._exporter.origin.load_onnx is None

    def prove(self, candidate: Candidate) -> CandidateResult:
        """Export a candidate into the study, and return what its parity check found.

        Raises:
            CifarxError: it cannot be made.
        """
        if self._is_given(candidate):
            return self._given_result()
        origin = self._exporter.origin
        require_convertible(origin, candidate.format, candidate.precision, NO_OPTIONS)
        started = time.monotonic()
        name = get_format(candidate.format).file_name(self._stem(candidate), candidate.precision)
        path = self._study.directory / name
        exported = self._exporter_of(candidate).run(candidate.format, candidate.precision, path)
        found = _proof(candidate, exported, time.monotonic() - started)
        weights = self._study.weights_file(candidate)
        if weights is not None:
            found = msgspec.structs.replace(found, weights_sha256=file_sha256(weights))
        return self._compared_with_original(found, exported.path) if candidate.pruned else found

    def measure(self, proved: CandidateResult, baseline: CandidateResult | None) -> Measurement:
        """Measure a proved candidate in turns with the baseline.

        Raises:
            CifarxError: one of the two cannot be run.
        """
        path = self._study.path(proved)
        known = baseline.measurement if baseline else None
        return measure(
            path,
            self._study.path(baseline) if baseline else path,
            known.latency.p50_us if known else None,
            self._exporter.reference.data.images,
            self._progress,
        )

    def reference_accuracy(self) -> float | None:
        """Return the accuracy of the network on the test images, or None without labels."""
        reference = self._exporter.reference
        labels, tested = reference.data.labels, reference.data.test_images
        if labels is None or not tested:
            return None
        return float((best_classes(reference.logits[:tested], reference.spec) == labels[:tested]).mean())

    def write_pick(self, candidate: Candidate, reason: str) -> Path:
        """Export the pick under its own name, with the reason in its spec, unless that file is there already.

        Raises:
            CheckFailed: it does not pass its parity check this time.
        """
        if self._is_given(candidate):
            return self._given
        suffix = get_format(candidate.format).suffix
        path = self._exporter.directory / f"{self._exporter.origin.stem}.{_PICK}{suffix}"
        if self._is_current(path, reason):
            return path
        exporter = self._exporter_of(candidate)
        exported = exporter.run(candidate.format, candidate.precision, path, {_PICK: reason})
        if not exported.report.summary.passed:
            raise CheckFailed(
                f"{path} failed the parity check that the candidate {candidate.name} had passed",
                f"see {exported.report_path}; the candidate is in {self._study.directory}",
            )
        return path

    def _stem(self, candidate: Candidate) -> str:
        stem = self._exporter.origin.stem
        if candidate.pruned:
            return f"{stem}.{_PRUNED}{100 * candidate.pruned:g}"
        return f"{stem}.{_FINE_TUNED}" if candidate.fine_tuned else stem

    def _compared_with_original(self, found: CandidateResult, path: Path) -> CandidateResult:
        """Return the result of a pruned candidate with what it costs, in place of how it agrees with its reference."""
        pruned = self._open_pruned(found.candidate)
        summary = None
        if found.outcome == "proved":
            row = get_format(found.format)
            with backend_class(row.backend)(model_file(path), CPU) as backend:
                tolerance = self._exporter.tolerances[found.precision]
                reference = self._exporter.reference
                summary = check_parity(reference, backend, tolerance, self._progress, (EVAL_BATCH_SIZE,)).summary
        return msgspec.structs.replace(
            found,
            agreement=summary and summary.agreement,
            agreement_bound=summary and summary.agreement_bound,
            accuracy=summary and summary.accuracy,
            accuracy_drop=summary and _accuracy_drop(summary),
            weights_removed=pruned.weights_removed,
            multiplications_removed=pruned.multiplications_removed,
        )

    def _open_pruned(self, candidate: Candidate) -> PrunedExporter:
        share = candidate.pruned
        if share not in self._pruned:
            file = self._study.weights_file(candidate)
            assert file is not None, "pruned networks have weights of their own"
            seconds, progress = self._pruning_seconds, self._progress
            self._pruned[share] = open_pruned_exporter(self._exporter, share, file, seconds, progress)
        return self._pruned[share]

    def _exporter_of(self, candidate: Candidate) -> Exporter:
        """Return the exporter of the network, of its fine-tuned weights, or of the pruned network."""
        if candidate.pruned:
            return self._open_pruned(candidate).exporter
        if not candidate.fine_tuned:
            return self._exporter
        if self._fine_tuned is None:
            file = self._study.directory / FINE_TUNED
            weights = load_or_fine_tune(self._exporter.sources["int8"], file, self._progress)
            self._fine_tuned = self._exporter.with_module(weights.build, weights.facts)
        return self._fine_tuned

    def _is_current(self, path: Path, reason: str) -> bool:
        try:
            spec = read_spec(path)
        except CifarxError:
            return False
        facts = spec.exporter or {}
        return facts.get(_PICK) == reason and spec.checkpoint_sha256 == self._exporter.origin.sha256

    def _is_given(self, candidate: Candidate) -> bool:
        """Return whether the file of the network is this candidate itself."""
        return candidate == BASELINE and not self.has_module

    def _given_result(self) -> CandidateResult:
        copy = self._study.directory / self._given.name
        with atomic_path(copy) as temporary:
            shutil.copyfile(self._given, temporary)
        accuracy = self.reference_accuracy()
        return CandidateResult(
            format=BASELINE.format,
            precision=BASELINE.precision,
            outcome="proved",
            file=copy.name,
            sha256=self._exporter.origin.sha256,
            size_bytes=copy.stat().st_size,
            agreement=1.0,
            accuracy=accuracy,
            accuracy_drop=None if accuracy is None else 0.0,
        )


def _proof(candidate: Candidate, exported: ExportResult, seconds: float) -> CandidateResult:
    report, summary = exported.report, exported.report.summary
    file = model_file(exported.path) if summary.passed else None
    facts = (read_spec(exported.path).exporter or {}) if file else report.environment.versions
    versions = {name: fact for name, fact in facts.items() if installed_version(name) == fact}
    return CandidateResult(
        format=candidate.format,
        precision=candidate.precision,
        fine_tuned=candidate.fine_tuned,
        pruned=candidate.pruned,
        outcome="proved" if summary.passed else "failed",
        reason="; ".join(f"{check.name}: {check.found}" for check in report.checks if not check.passed),
        file=exported.path.name if file else None,
        sha256=file_sha256(file) if file else None,
        size_bytes=file.stat().st_size if file else None,
        agreement=summary.agreement,
        agreement_bound=summary.agreement_bound,
        accuracy=summary.accuracy,
        accuracy_drop=_accuracy_drop(summary),
        seconds=seconds,
        versions=versions,
        facts={name: fact for name, fact in facts.items() if name not in versions},
    )


def _accuracy_drop(summary: ParitySummary) -> float | None:
    if summary.accuracy is None or summary.reference_accuracy is None:
        return None
    return summary.reference_accuracy - summary.accuracy
