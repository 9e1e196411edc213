"""Find the best artifact of a network for a requirement, prove it, and write it beside the checkpoint."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cifarx_export.exporter import Exporter, open_exporter
from cifarx_export.optimization.candidates import BASELINE, Candidate, is_late, list_candidates
from cifarx_export.optimization.requirement import explain_no_pick, parse_requirement
from cifarx_export.optimization.results import CandidateResult, OptimizationReport, Preference
from cifarx_export.optimization.search import Goal, Search, TimeLimit
from cifarx_export.optimization.selection import choose, choose_pruned, explain_pick, pareto_front
from cifarx_export.optimization.study import SUFFIX, Study, StudyIdentity
from cifarx_export.optimization.workbench import Workbench
from cifarx_export.origin import origin_directory
from cifarx_serve.errors import UsageError
from cifarx_serve.files.directory_lock import lock_directory
from cifarx_serve.files.file_format import FileFormat, detect_format
from cifarx_serve.progress import Progress, silent
from cifarx_serve.system.environment import Environment, current_environment
from cifarx_serve.system.terminal import require_utf8
from cifarx_serve.system.versions import package_version
from cifarx_train.data.dataset import OnError
from cifarx_train.data.selection import DataSource
from cifarx_train.models.options import ModelOptions
from cifarx_train.pruning import require_share, require_torch_pruning

DEFAULT_MINUTES: Final = 10.0

_PRUNING_TIME: Final = 0.2
"""The part of the time that the fine-tuning of a pruned network may take: 2 of 10 minutes."""


def optimize(
    checkpoint: str | Path,
    *,
    require: str = "",
    prefer: Preference = "latency",
    targets: Sequence[str] = ("cpu",),
    minutes: float = DEFAULT_MINUTES,
    prune: float | None = None,
    model: str | ModelOptions | None = None,
    data: str | DataSource = "auto",
    on_error: OnError = "raise",
    allow_chance_accuracy: bool = False,
    progress: Progress = silent,
) -> OptimizationReport:
    """Make and prove candidates, measure them in turns with ONNX Runtime in fp32, and write the best one.

    A candidate is a format in a precision. It counts only if it passes its parity check. What is found is kept in the
    directory `NAME.optimize` beside the checkpoint, and a search that was ended goes on there. The pick is exported
    once more, and checked, as `NAME.optimized` with the suffix of its format. Ctrl-C ends the search as the end of the
    time does: with the best candidate so far.

    Args:
        checkpoint: a checkpoint, or an ONNX file in fp32, as for `export`.
        require: bounds such as `accuracy_drop<=0.5, p99<2ms`; see `cifarx_export.optimization.requirement`.
        prefer: what is best among the candidates that meet the requirement.
        targets: where the pick shall run, see `cifarx_export.optimization.candidates.TARGETS`.
        minutes: limit for the time of the search. Work that cannot be interrupted, and the export of the pick, may
            take longer.
        prune: a share of the channels, above 0 and at most 0.9. The network without them is fine-tuned and tried too,
            in the format that was the best one before. Its artifacts are proved against the pruned network in PyTorch;
            their accuracy and agreement, in the requirement and in the report, are against the original one.
        model, data, on_error, allow_chance_accuracy, progress: see `cifarx_export.export.export`.

    Raises:
        UsageError: the requirement, the number of minutes or the share of channels is not valid; or an ONNX file, which
            has no module, shall be pruned, or torch-pruning is not installed.
        CifarxError: the network cannot be exported, see `cifarx_export.export.export`.
    """
    started = time.monotonic()
    requirement = parse_requirement(require)
    if not 0 < minutes < float("inf"):
        raise UsageError(f"{minutes:g} minutes is no time", "give a number above 0, such as --minutes 10")
    path = Path(checkpoint)
    require_utf8(path)
    if prune is not None:
        _require_prunable(path, prune)
    limit = TimeLimit(60 * minutes)
    stated = model if isinstance(model, ModelOptions) else ModelOptions(model)
    exporter = open_exporter(
        path,
        stated,
        origin_directory(path, stated),
        data=data,
        on_error=on_error,
        allow_chance_accuracy=allow_chance_accuracy,
        progress=limit.checking(progress),
    )
    directory = exporter.directory / f"{exporter.origin.stem}{SUFFIX}"
    environment = current_environment()
    with lock_directory(directory):
        study = Study(directory, _identity(exporter, environment), progress)
        workbench = Workbench(exporter, study, path, _PRUNING_TIME * 60 * minutes, limit.checking(progress))
        goal = Goal(requirement, prefer, exporter.origin.weight_bytes)
        search = Search(study, goal, workbench.prove, workbench.measure, limit, progress)
        wanted = [one for one in list_candidates(targets) if workbench.has_module or not one.fine_tuned]
        _run(search, wanted, goal, prune)
        eligible = [result for result in search.results if result.candidate in wanted or result.pruned]
        picked = choose(eligible, requirement, prefer)
        baseline = search.baseline.name if search.baseline else None
        if picked is None or baseline is None:
            reason, file = explain_no_pick(eligible, requirement), None
        else:
            reason = explain_pick(picked, eligible, requirement, prefer, baseline)
            file = workbench.write_pick(picked.candidate, reason)
    return OptimizationReport(
        checkpoint=exporter.origin.name,
        checkpoint_sha256=exporter.origin.sha256,
        data=exporter.reference.data.describe(),
        reference_accuracy=workbench.reference_accuracy(),
        require=require.strip(),
        prefer=prefer,
        targets=tuple(targets),
        baseline=baseline,
        results=tuple(result for result in search.results if not _is_needless(result)),
        front=tuple(result.name for result in pareto_front(eligible, prefer)),
        pick=picked.name if picked else None,
        reason=reason,
        file=str(file) if file else None,
        study=str(directory),
        stopped=search.stopped,
        seconds=time.monotonic() - started,
        environment=environment,
    )


def _run(search: Search, wanted: Sequence[Candidate], goal: Goal, prune: float | None) -> None:
    """Try all candidates. Those with pruned channels follow the quick formats, which decide on their format."""
    late = [one for one in wanted if is_late(one)]
    search.run([BASELINE, *(one for one in wanted if one != BASELINE and one not in late)], len(late))
    if prune is not None:
        results = [result for result in search.results if result.candidate in wanted]
        search.run(choose_pruned(results, goal.requirement, goal.prefer, prune), len(late))
    search.run(late)


def _require_prunable(path: Path, share: float) -> None:
    """Check that channels can be pruned, before any long work.

    Raises:
        UsageError: see `optimize`.
    """
    require_share(share)
    if path.is_file() and detect_format(path) is FileFormat.ONNX:
        raise UsageError(f"{path} is an ONNX file, whose channels cannot be pruned", "give its checkpoint")
    require_torch_pruning()


def _is_needless(result: CandidateResult) -> bool:
    """Return whether a result is no news: nobody asked for fine-tuned weights, and they were not needed."""
    return result.fine_tuned and result.outcome in ("skipped", "not tried")


def _identity(exporter: Exporter, environment: Environment) -> StudyIdentity:
    origin = exporter.origin
    return StudyIdentity(
        checkpoint=origin.sha256,
        spec=hashlib.sha256(origin.spec.to_json().encode()).hexdigest(),
        data=exporter.reference.data.fingerprint,
        cpu=environment.cpu,
        threads=environment.threads,
        version=package_version(),
    )
