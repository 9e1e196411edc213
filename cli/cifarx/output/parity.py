"""Formats a parity report for the terminal: the outcome, each check with its mark, and the metrics.

A tick stands for a check that passed, a cross for one that failed, and a question mark for what is only assumed.
"""

import io
import sys
from typing import TYPE_CHECKING

from cifarx.output.console import table_width, tick
from cifarx_export.parity.checks import Check
from cifarx_export.parity.error_analysis import ErrorAnalysis
from cifarx_export.parity.report import WARNING, ParityReport, describe_images
from cifarx_export.parity.spec_checks import ASSUMED
from cifarx_serve.system.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table

_MAX_PAIRS = 3


def parity_lines(report: ParityReport) -> str:
    """Return the report of one artifact, as wide as standard output, and in color if that is a terminal.

    The text has no final newline. Names come from files, so unprintable characters are replaced.
    """
    from rich.console import Console
    from rich.text import Text

    summary = report.summary
    text = io.StringIO()
    console = Console(file=text, width=table_width(), force_terminal=sys.stdout.isatty(), highlight=False)
    outcome = "parity check passed" if summary.passed else "parity check FAILED"
    assumed = f" ({ASSUMED}: {', '.join(report.assumed)})" if report.assumed else ""
    title = f"{tick(summary.passed)} {report.artifact}: {report.format} {report.precision}, {outcome}{assumed}"
    console.print(Text(printable(title), f"bold {_color(summary.passed)}"), overflow="fold")
    for warning in summary.warnings:
        console.print(Text(printable(f"{WARNING}: {warning}"), f"bold {_color(None)}"), overflow="fold")
    console.print(_table(report))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _table(report: ParityReport) -> "Table":
    """Return a table with three columns: a mark, a name, and what was found."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=2 + len(tick(True)), no_wrap=True, justify="right")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _comparison(report):
        grid.add_row("", Text(name, "dim"), Text(printable(text), "dim"))
    for check in report.checks:
        mark = _mark(check)
        found = Text(printable(check.found), "" if mark else _color(mark))
        grid.add_row(Text(tick(mark), _color(mark)), Text(check.name), found)
    for name, text in _metrics(report):
        grid.add_row("", Text(name, "dim"), Text(printable(text)))
    return grid


def _comparison(report: ParityReport) -> list[tuple[str, str]]:
    """Return what the artifact was compared with, and on which data."""
    summary = report.summary
    sizes = ", ".join(map(str, summary.batch_sizes))
    return [
        ("reference", report.checkpoint),
        ("data", f"{describe_images(summary)}, batch sizes {sizes}, {summary.provider}"),
    ]


def _metrics(report: ParityReport) -> list[tuple[str, str]]:
    """Return the metrics that were measured."""
    summary, rows = report.summary, []
    if summary.required_tolerance is not None:
        errors = (
            f"max {summary.max_abs_error:.2e}, mean {summary.mean_abs_error:.2e}, "
            f"99.9th percentile {summary.p999_abs_error:.2e}"
        )
        rows += [("errors", errors), ("required", f"tolerance {summary.required_tolerance:.2e}")]
    if summary.reference_accuracy is not None and summary.accuracy is not None:
        tested = f", of the {summary.test_images:,} test images" if summary.training_images else ""
        rows.append(("accuracy", f"{summary.accuracy:.2%}, reference {summary.reference_accuracy:.2%}{tested}"))
    if report.error_analysis is not None and report.error_analysis.disagreements:
        rows.append(("disagreements", _disagreements(report.error_analysis)))
    return rows


def _disagreements(analysis: ErrorAnalysis) -> str:
    """Return the most frequent disagreements: the class of the reference, that of the artifact, and how often."""
    names = analysis.class_names
    shown = analysis.disagreements[:_MAX_PAIRS]
    return ", ".join(f"{names[pair.reference]} as {names[pair.artifact]} ({pair.count:,})" for pair in shown)


def _mark(check: Check) -> bool | None:
    """Return whether a check passed, or None for what is only assumed."""
    return None if check.assumed and check.passed else check.passed


def _color(passed: bool | None) -> str:
    return "yellow" if passed is None else "green" if passed else "red"
