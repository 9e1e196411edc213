"""The parts that the table on a terminal and the page share: columns, verdicts and summaries of a search."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from cifarx.bench_report.summary import UNSTABLE
from cifarx_export.optimization.results import CandidateResult, Latency, Measurement, OptimizationReport


class Column(NamedTuple):
    """One column of figures; a narrow terminal shows only the `essential` ones."""

    heading: str
    text: Callable[[CandidateResult], str]
    essential: bool = True


def verdict(report: OptimizationReport, result: CandidateResult) -> str:
    """Return whether a candidate is the pick or on the front, or what became of it if it is not in the choice."""
    if result.name == report.pick:
        return "pick"
    if result.name in report.front:
        return "front"
    return "" if result.is_measured else result.outcome


def columns(results: Sequence[CandidateResult]) -> list[Column]:
    """Return the columns of figures, without those that no candidate has a value for."""
    return [column for column in _COLUMNS if any(column.text(result) for result in results)]


def summary_lines(report: OptimizationReport) -> list[str]:
    """Return the lines below the table: the pick or why there is none, and what was not tried."""
    lines = [f"pick: {report.pick}, {report.reason}" if report.pick else f"no pick: {report.reason}"]
    lines += dict.fromkeys(f"pruned: {result.facts['pruned']}" for result in report.results if "pruned" in result.facts)
    if report.stopped is not None:
        left = [result.name for result in report.results if result.outcome == "not tried"]
        why = "the time was over" if report.stopped == "time" else "interrupted"
        lines.append(f"{why}, not tried: {', '.join(left) or 'nothing'}; run the command again to go on")
    if any(not _is_stable(result) for result in report.results):
        lines.append(f"{UNSTABLE} not stable: measure again on a quiet machine")
    return lines


def reason_lines(report: OptimizationReport) -> list[str]:
    """Return why each candidate that was not measured is not in the choice, without those that were not tried."""
    left_out = [result for result in report.results if not result.is_measured and result.outcome != "not tried"]
    return [f"{result.name} {result.outcome}: {result.reason}" for result in left_out]


def title(report: OptimizationReport) -> str:
    """Return a line that says what was searched for, and on which images."""
    wanted = f", {report.require}" if report.require else ""
    return f"{report.checkpoint}: best {report.prefer}{wanted}; on {report.data}"


def _is_stable(result: CandidateResult) -> bool:
    found = result.measurement
    return found is None or (found.latency.stable and (found.one_thread is None or found.one_thread.stable))


def _of(text: Callable[[Measurement], str]) -> Callable[[CandidateResult], str]:
    return lambda result: "" if result.measurement is None else text(result.measurement)


def _p50(latency: Latency) -> str:
    return f"{'' if latency.stable else UNSTABLE}{latency.p50_us:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


_COLUMNS: Final = (
    Column("p50 µs", _of(lambda found: _p50(found.latency))),
    Column("p99 µs", _of(lambda found: f"{found.latency.p99_us:,.0f}")),
    Column("speed-up", _of(lambda found: f"{found.latency.speedup:.2f}x")),
    Column("1 thread µs", _of(lambda found: _p50(found.one_thread) if found.one_thread else ""), essential=False),
    Column("speed-up, 1 thread", _of(lambda found: f"{found.one_thread.speedup:.2f}x" if found.one_thread else "")),
    Column("images/s", _of(lambda found: f"{found.images_per_s:,.0f}")),
    Column("at batch", _of(lambda found: str(found.batch)), essential=False),
    Column("throughput gain", _of(lambda found: f"{found.throughput_gain:.2f}x"), essential=False),
    Column("KB", lambda result: "" if result.size_bytes is None else f"{result.size_bytes / 1e3:,.0f}"),
    Column("agreement", lambda result: _share(result.agreement)),
    Column("points lost", lambda result: "" if result.accuracy_drop is None else f"{100 * result.accuracy_drop:.2f}"),
    Column("weights removed", lambda result: _share(result.weights_removed), essential=False),
    Column("multiplications removed", lambda result: _share(result.multiplications_removed), essential=False),
    Column("load ms", _of(lambda found: f"{found.load_ms:,.0f}"), essential=False),
    Column("peak MB", _of(lambda found: f"{found.peak_bytes / 1e6:,.0f}"), essential=False),
)
