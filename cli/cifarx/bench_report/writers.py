"""Writes a benchmark report to the terminal or to a file: JSON, CSV, Markdown, HTML or PNG."""

import csv
import io
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final

import msgspec

from cifarx.bench_report.summary import (
    columns,
    environment_line,
    has_device_times,
    has_gpu_memory,
    remarks,
    scenario_lines,
    title,
)
from cifarx.output.console import json_document, result, table, table_width
from cifarx.output.escaping import csv_cell, markdown_text
from cifarx_serve.benchmarking.benchmark import BenchmarkReport
from cifarx_serve.errors import UsageError
from cifarx_serve.files.atomic import atomic_path, require_writable

_PLOTTED: Final = (".html", ".png")
_WIDE: Final = 170  # characters of a terminal that has room for every column


def require_report_path(path: Path) -> None:
    """Check, before any long work, that a report can be written to `path`.

    Raises:
        UsageError: the suffix is not that of a report format.
        OutputError: the folder cannot be written.
        ModuleNotFoundError: the library that draws the plots is not installed.
    """
    if path.suffix not in _WRITERS:
        raise UsageError(f"cannot write a report as {path}", f"give a name that ends in {', '.join(_WRITERS)}")
    require_writable(path.parent)
    if path.suffix in _PLOTTED:
        import_module("matplotlib")


def print_report(report: BenchmarkReport) -> None:
    """Print the table, the scenarios and the environment; a narrow terminal gets only the essential columns."""
    wide = table_width() >= _WIDE
    shown = [column for column in columns(report) if wide or column.essential]
    cells = [[column.text(row) for column in shown] for row in report.rows]
    table(title(report), [column.heading for column in shown], cells)
    for line in _lines_below_table(report):
        result(line)


def write_report(report: BenchmarkReport, path: Path) -> None:
    """Write the report in the format of the path's suffix, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        _WRITERS[path.suffix](report, temporary)


def markdown(report: BenchmarkReport) -> str:
    """Return a Markdown table with its title above, and the scenarios and the environment below."""
    shown = columns(report)
    headings = " | ".join(column.heading for column in shown)
    lines = [markdown_text(title(report)), "", f"| {headings} |", f"|{' --- |' * 3}{' ---: |' * (len(shown) - 3)}"]
    for row in report.rows:
        cells = [markdown_text(column.text(row)) for column in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(["\n".join(lines), *map(markdown_text, _lines_below_table(report))])


def _lines_below_table(report: BenchmarkReport) -> list[str]:
    return [*scenario_lines(report), *remarks(report), environment_line(report.environment)]


def _write_json(report: BenchmarkReport, path: Path) -> None:
    path.write_text(json_document(report, indent=2) + "\n", encoding="utf-8")


def _write_csv(report: BenchmarkReport, path: Path) -> None:
    """Write one line per row with the fields of the JSON report, without the percentiles."""
    rows = [msgspec.structs.asdict(row) for row in report.rows]
    shown = {"percentiles_us": False, "device_us": has_device_times(report), "gpu_bytes": has_gpu_memory(report)}
    names = [name for name in rows[0] if shown.get(name, True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: csv_cell(value) if isinstance(value, str) else value for name, value in row.items()})
    path.write_text(text.getvalue(), encoding="utf-8")


def _write_markdown(report: BenchmarkReport, path: Path) -> None:
    path.write_text(markdown(report) + "\n", encoding="utf-8")


def _write_html(report: BenchmarkReport, path: Path) -> None:
    from cifarx.bench_report.html import render_html_report  # needs matplotlib and Jinja, from the `train` extra

    path.write_text(render_html_report(report), encoding="utf-8")


def _write_png(report: BenchmarkReport, path: Path) -> None:
    from cifarx.bench_report.plots import write_png  # needs matplotlib, from the `train` extra

    write_png(report, path)


_WRITERS: Final[dict[str, Callable[[BenchmarkReport, Path], None]]] = {
    ".json": _write_json,
    ".csv": _write_csv,
    ".md": _write_markdown,
    ".html": _write_html,
    ".png": _write_png,
}
