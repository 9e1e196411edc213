"""A proof as lines to read: a verdict, then each check with a tick or a cross, then the figures."""

import io
import sys
from typing import TYPE_CHECKING

from cifarx.output.console import table_width, tick
from cifarx_export.parity.error_analysis import ErrorAnalysis
from cifarx_export.parity.report import ParityReport

if TYPE_CHECKING:
    from rich.table import Table

_PAIRS_SHOWN = 3


def parity_lines(report: ParityReport) -> str:
    """The report of one artifact, as wide as standard output and coloured where that is a terminal, no final newline.

    Names come from files: what a terminal would not print as it is, it does not get.
    """
    from rich.console import Console
    from rich.text import Text

    summary = report.summary
    text = io.StringIO()
    page = Console(file=text, width=table_width(), force_terminal=sys.stdout.isatty(), highlight=False)
    verdict = "proved" if summary.passed else "NOT proved"
    title = f"{tick(summary.passed)} {report.artifact}: {report.format} {report.precision} {verdict}"
    page.print(Text(_printable(title), f"bold {_colour(summary.passed)}"), overflow="fold")
    page.print(_table(report))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _table(report: ParityReport) -> "Table":
    """Columns: a mark, a name, and what was found."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=2 + len(tick(True)), no_wrap=True, justify="right")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, compared in _before(report):
        grid.add_row("", Text(name, "dim"), Text(_printable(compared), "dim"))
    for check in report.checks:
        colour = _colour(check.passed)
        found = Text(_printable(check.found), "" if check.passed else colour)
        grid.add_row(Text(tick(check.passed), colour), Text(check.name), found)
    for name, measured in _after(report):
        grid.add_row("", Text(name, "dim"), Text(_printable(measured)))
    return grid


def _before(report: ParityReport) -> list[tuple[str, str]]:
    """What was compared."""
    summary = report.summary
    sizes = ", ".join(map(str, summary.batch_sizes))
    return [
        ("against", report.checkpoint),
        ("on", f"{summary.images:,} images of {summary.data}, batches of {sizes}, {summary.provider}"),
    ]


def _after(report: ParityReport) -> list[tuple[str, str]]:
    """What was measured."""
    summary, rows = report.summary, []
    if summary.required_tolerance is not None:
        errors = (
            f"max {summary.max_abs_error:.2e}, mean {summary.mean_abs_error:.2e}, "
            f"99.9th percentile {summary.p999_abs_error:.2e}"
        )
        rows += [("errors", errors), ("would pass", f"a tolerance of {summary.required_tolerance:.2e}")]
    if summary.reference_accuracy is not None and summary.accuracy is not None:
        rows.append(("accuracy", f"{summary.accuracy:.2%}, the checkpoint {summary.reference_accuracy:.2%}"))
    if report.error_analysis is not None and report.error_analysis.disagreements:
        rows.append(("differs most", _pairs(report.error_analysis)))
    return rows


def _pairs(evidence: ErrorAnalysis) -> str:
    names = evidence.class_names
    shown = evidence.disagreements[:_PAIRS_SHOWN]
    return ", ".join(f"{names[pair.reference]} as {names[pair.artifact]} ({pair.count:,})" for pair in shown)


def _colour(passed: bool) -> str:
    return "green" if passed else "red"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "�" for letter in text)
