"""A benchmark as one HTML page that stands alone: no script, nothing loaded from elsewhere, readable from the disk."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import jinja2
import msgspec
from markupsafe import Markup

from cifarx.bench_report.plots import Series, benchmark_figures, by_file, printable, swatches
from cifarx.bench_report.writers import Scenario, has_device_times, scenarios, title
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow

_TEMPLATE: Final = "benchmark_page.html"


class Column(NamedTuple):
    """One column of the table: a row's text in it, given the first file's row of the same batch size, if any."""

    heading: str
    text: Callable[[BenchmarkRow, BenchmarkRow | None], str]
    number: bool = True


class Line(NamedTuple):
    """One row of the table; `number` is its file's, from 1."""

    number: int
    cells: tuple[str, ...]
    stable: bool


class Glance(NamedTuple):
    """One file in the terms of MLPerf Inference, and whether it is the best in them.

    Attributes:
        number: of the file, from 1.
        row: any of its rows, for what all have in common.
        single_stable, offline_stable: whether the row that the figure is from was stable.
    """

    number: int
    row: BenchmarkRow
    scenario: Scenario
    best_single: bool
    best_offline: bool
    single_stable: bool
    offline_stable: bool


def benchmark_page(report: BenchmarkReport) -> str:
    """The page as text, of a report with at least one row; the same each time."""
    files = by_file(report)
    timed = has_device_times(report)
    columns = [column for column in _COLUMNS if timed or column.text is not _device]
    return (
        _templates()
        .get_template(_TEMPLATE)
        .render(
            report=report,
            title=title(report),
            files=files,
            swatches=[Markup(swatch) for swatch in swatches(report)],
            plots=[plot._replace(svg=Markup(plot.svg)) for plot in benchmark_figures(report)],
            glances=_glances(report, files),
            columns=columns,
            batches=_lines(files, columns),
            timed=timed,
            stable=all(row.stable for row in report.rows),
        )
    )


def _templates() -> jinja2.Environment:
    """Names of files and data come from anywhere: all text is escaped, and what no page can hold is replaced."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("cifarx.bench_report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    found.filters["microseconds"] = _microseconds
    return found


def _glances(report: BenchmarkReport, files: tuple[Series, ...]) -> tuple[Glance, ...]:
    """Each file alone, since one that was measured twice has one name."""
    found = [scenarios(msgspec.structs.replace(report, rows=one.rows))[0] for one in files]
    single = min((one.single_stream_us for one in found if one.single_stream_us is not None), default=None)
    offline = max(one.offline for one in found)
    return tuple(
        Glance(
            number,
            one.rows[0],
            scenario,
            scenario.single_stream_us is not None and scenario.single_stream_us == single,
            scenario.offline == offline,
            all(row.stable for row in one.rows if row.batch == 1),
            all(row.stable for row in one.rows if row.batch == scenario.batch),
        )
        for number, (one, scenario) in enumerate(zip(files, found, strict=True), 1)
    )


def _lines(files: tuple[Series, ...], columns: Sequence[Column]) -> tuple[tuple[Line, ...], ...]:
    """The lines of each batch size, the files in their order."""
    first = {row.batch: row for row in files[0].rows}
    lines: dict[int, list[Line]] = {}
    for number, one in enumerate(files, 1):
        for row in one.rows:
            cells = tuple(column.text(row, first.get(row.batch)) for column in columns)
            lines.setdefault(row.batch, []).append(Line(number, cells, row.stable))
    return tuple(tuple(lines[batch]) for batch in sorted(lines))


def _microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _p50(row: BenchmarkRow, _: BenchmarkRow | None) -> str:
    return f"{'' if row.stable else '~'}{_microseconds(row.p50_us)}"


def _device(row: BenchmarkRow, _: BenchmarkRow | None) -> str:
    return "-" if row.device_us is None else _microseconds(row.device_us)


def _speed_up(row: BenchmarkRow, first: BenchmarkRow | None) -> str:
    return "-" if first is None else f"{first.p50_us / row.p50_us:.2f}x"


def _accuracy(row: BenchmarkRow, _: BenchmarkRow | None) -> str:
    return "-" if row.accuracy is None else f"{row.accuracy:.2%}"


_COLUMNS: Final = (
    Column("File", lambda row, _: row.file, number=False),
    Column("Batch", lambda row, _: f"{row.batch:,}"),
    Column("p50 µs", _p50),
    Column("p90 µs", lambda row, _: _microseconds(row.p90_us)),
    Column("p99 µs", lambda row, _: _microseconds(row.p99_us)),
    Column("Device µs", _device),
    Column("Speed-up", _speed_up),
    Column("Images/s", lambda row, _: f"{row.images_per_s:,.0f}"),
    Column("Calls", lambda row, _: f"{row.samples:,}"),
    Column("Spread", lambda row, _: f"{row.spread:.1%}"),
    Column("Agreement", lambda row, _: f"{row.agreement:.2%}"),
    Column("Accuracy", _accuracy),
    Column("Load ms", lambda row, _: f"{row.load_ms:,.0f}"),
    Column("First call ms", lambda row, _: f"{row.first_call_ms:,.1f}"),
    Column("Size KB", lambda row, _: f"{row.size_bytes / 1e3:,.0f}"),
    Column("Peak MB", lambda row, _: f"{row.peak_bytes / 1e6:,.0f}"),
    Column("Precision", lambda row, _: row.precision, number=False),
    Column("Backend", lambda row, _: row.backend, number=False),
    Column("Provider", lambda row, _: row.provider, number=False),
)
