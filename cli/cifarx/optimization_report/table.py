"""Prints the result of a search as one table, and below it why candidates are not in the choice."""

from typing import Final

from cifarx.bench_report.summary import environment_line
from cifarx.optimization_report.columns import columns, reason_lines, summary_lines, title, verdict
from cifarx.output.console import result as print_lines
from cifarx.output.console import table, table_width
from cifarx_export.optimization.results import OptimizationReport

_WIDE: Final = 170  # characters of a terminal that has room for every column
_WIDE_WITH_PRUNED: Final = 240


def print_report(report: OptimizationReport) -> None:
    """Print the candidates, the pick and the environment; a narrow terminal gets only the essential columns."""
    wide = table_width() >= (_WIDE_WITH_PRUNED if any(result.pruned for result in report.results) else _WIDE)
    shown = [column for column in columns(report.results) if wide or column.essential]
    rows = [
        [result.name, verdict(report, result), *(column.text(result) for column in shown)] for result in report.results
    ]
    table(title(report), ["candidate", "", *(column.heading for column in shown)], rows)
    print_lines(*reason_lines(report), *summary_lines(report), environment_line(report.environment))
