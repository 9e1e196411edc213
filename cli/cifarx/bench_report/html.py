"""Renders a benchmark report as a self-contained HTML page."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
from markupsafe import Markup

from cifarx.bench_report.plots import Series, file_series, legend_swatches, render_plots
from cifarx.bench_report.summary import (
    UNSTABLE,
    ScenarioResults,
    has_device_times,
    has_gpu_memory,
    scenario_results,
    title,
)
from cifarx_export.html_report import render_page
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow

_TEMPLATE: Final = "benchmark_report.html"
_MISSING: Final = "-"


class Column(NamedTuple):
    """One column of the table.

    Attributes:
        heading: the text at its top.
        text: returns the text of a row, given the first file's row of the same batch size, or None without one.
        number: whether the column is aligned to the right.
    """

    heading: str
    text: Callable[[BenchmarkRow, BenchmarkRow | None], str]
    number: bool = True


class TableRow(NamedTuple):
    """One row of the table; `number` is the number of its file, from 1."""

    number: int
    cells: tuple[str, ...]
    stable: bool


class FileOverview(NamedTuple):
    """One file's results in the scenarios of MLPerf Inference, and whether they are the best ones.

    Attributes:
        number: the number of the file, from 1.
        row: Any row of the file, for the fields that all of them share.
        scenarios: the results.
        best_single, best_offline: whether no other file is better in that scenario.
        single_stable, offline_stable: whether the row of that result was stable.
    """

    number: int
    row: BenchmarkRow
    scenarios: ScenarioResults
    best_single: bool
    best_offline: bool
    single_stable: bool
    offline_stable: bool


def render_html_report(report: BenchmarkReport) -> str:
    """Return the page as text.

    The result depends only on `report`, which must have at least one row.
    """
    files = file_series(report)
    timed, on_gpu = has_device_times(report), has_gpu_memory(report)
    omitted = [*([] if timed else [_device]), *([] if on_gpu else [_gpu_memory])]
    columns = [column for column in _COLUMNS if column.text not in omitted]
    return render_page(
        "cifarx.bench_report",
        _TEMPLATE,
        {"microseconds": _microseconds},
        report=report,
        title=title(report),
        warnings=report.warnings,
        files=files,
        swatches=[Markup(swatch) for swatch in legend_swatches(report)],
        plots=[plot._replace(svg=Markup(plot.svg)) for plot in render_plots(report)],
        overview=_overview(report, files),
        columns=columns,
        batches=_rows_by_batch(files, columns),
        timed=timed,
        on_gpu=on_gpu,
        stable=all(row.stable for row in report.rows),
    )


def _overview(report: BenchmarkReport, files: tuple[Series, ...]) -> tuple[FileOverview, ...]:
    """Summarize each series on its own: a file that was measured twice has two series with one name."""
    results = [scenario_results(msgspec.structs.replace(report, rows=series.rows))[0] for series in files]
    latencies = [result.single_stream_us for result in results if result.single_stream_us is not None]
    best_single = min(latencies, default=None)
    best_offline = max(result.offline_images_per_s for result in results)
    return tuple(
        FileOverview(
            number,
            series.rows[0],
            result,
            result.single_stream_us is not None and result.single_stream_us == best_single,
            result.offline_images_per_s == best_offline,
            all(row.stable for row in series.rows if row.batch == 1),
            all(row.stable for row in series.rows if row.batch == result.offline_batch),
        )
        for number, (series, result) in enumerate(zip(files, results, strict=True), 1)
    )


def _rows_by_batch(files: tuple[Series, ...], columns: Sequence[Column]) -> tuple[tuple[TableRow, ...], ...]:
    """Return the table rows of each batch size, with the files in their order."""
    first = {row.batch: row for row in files[0].rows}
    rows: dict[int, list[TableRow]] = {}
    for number, series in enumerate(files, 1):
        for row in series.rows:
            cells = tuple(column.text(row, first.get(row.batch)) for column in columns)
            rows.setdefault(row.batch, []).append(TableRow(number, cells, row.stable))
    return tuple(tuple(rows[batch]) for batch in sorted(rows))


def _microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _p50(row: BenchmarkRow, _: BenchmarkRow | None) -> str:
    return f"{'' if row.stable else UNSTABLE}{_microseconds(row.p50_us)}"


def _device(row: BenchmarkRow, _: BenchmarkRow | None) -> str:
    return _MISSING if row.device_us is None else _microseconds(row.device_us)


def _gpu_memory(row: BenchmarkRow, _: BenchmarkRow | None) -> str:
    return _MISSING if row.gpu_bytes is None else f"{row.gpu_bytes / 1e6:,.0f}"


def _speedup(row: BenchmarkRow, first: BenchmarkRow | None) -> str:
    return _MISSING if first is None else f"{first.p50_us / row.p50_us:.2f}x"


def _accuracy(row: BenchmarkRow, _: BenchmarkRow | None) -> str:
    return _MISSING if row.accuracy is None else f"{row.accuracy:.2%}"


_COLUMNS: Final = (
    Column("File", lambda row, _: row.file, number=False),
    Column("Batch", lambda row, _: f"{row.batch:,}"),
    Column("p50 µs", _p50),
    Column("p90 µs", lambda row, _: _microseconds(row.p90_us)),
    Column("p99 µs", lambda row, _: _microseconds(row.p99_us)),
    Column("Device µs", _device),
    Column("Speed-up", _speedup),
    Column("Images/s", lambda row, _: f"{row.images_per_s:,.0f}"),
    Column("Calls", lambda row, _: f"{row.samples:,}"),
    Column("Spread", lambda row, _: f"{row.spread:.1%}"),
    Column("Agreement", lambda row, _: f"{row.agreement:.2%}"),
    Column("Accuracy", _accuracy),
    Column("Load ms", lambda row, _: f"{row.load_ms:,.0f}"),
    Column("First call ms", lambda row, _: f"{row.first_call_ms:,.1f}"),
    Column("Size KB", lambda row, _: f"{row.size_bytes / 1e3:,.0f}"),
    Column("Peak MB", lambda row, _: f"{row.peak_bytes / 1e6:,.0f}"),
    Column("GPU MB", _gpu_memory),
    Column("Precision", lambda row, _: row.precision, number=False),
    Column("Backend", lambda row, _: row.backend, number=False),
    Column("Provider", lambda row, _: row.provider, number=False),
)
