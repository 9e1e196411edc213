"""Find the best artifact of a network for a requirement, prove it, and write it beside the checkpoint."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cifarx_export.exporter import Exporter, open_exporter
from cifarx_export.optimization.candidates import BASELINE, list_candidates
from cifarx_export.optimization.requirement import explain_no_pick, parse_requirement
from cifarx_export.optimization.results import CandidateResult, OptimizationReport, Preference
from cifarx_export.optimization.search import Goal, Search, TimeLimit
from cifarx_export.optimization.selection import choose, explain_pick, pareto_front
from cifarx_export.optimization.study import SUFFIX, Study, StudyIdentity
from cifarx_export.optimization.workbench import Workbench
from cifarx_export.origin import origin_directory
from cifarx_serve.errors import UsageError
from cifarx_serve.files.directory_lock import lock_directory
from cifarx_serve.progress import Progress, silent
from cifarx_serve.system.environment import Environment, current_environment
from cifarx_serve.system.terminal import require_utf8
from cifarx_serve.system.versions import package_version
from cifarx_train.data.dataset import OnError
from cifarx_train.data.selection import DataSource
from cifarx_train.models.options import ModelOptions

DEFAULT_MINUTES: Final = 10.0


def optimize(
    checkpoint: str | Path,
    *,
    require: str = "",
    prefer: Preference = "latency",
    targets: Sequence[str] = ("cpu",),
    minutes: float = DEFAULT_MINUTES,
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
        model, data, on_error, allow_chance_accuracy, progress: see `cifarx_export.export.export`.

    Raises:
        UsageError: the requirement or the number of minutes is not valid.
        CifarxError: the network cannot be exported, see `cifarx_export.export.export`.
    """
    started = time.monotonic()
    requirement = parse_requirement(require)
    if not 0 < minutes < float("inf"):
        raise UsageError(f"{minutes:g} minutes is no time", "give a number above 0, such as --minutes 10")
    path = Path(checkpoint)
    require_utf8(path)
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
        workbench = Workbench(exporter, study, path, limit.checking(progress))
        goal = Goal(requirement, prefer, exporter.origin.weight_bytes)
        search = Search(study, goal, workbench.prove, workbench.measure, limit, progress)
        wanted = [one for one in list_candidates(targets) if workbench.has_module or not one.fine_tuned]
        search.run(wanted if BASELINE in wanted else [BASELINE, *wanted])
        eligible = [result for result in search.results if result.candidate in wanted]
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
