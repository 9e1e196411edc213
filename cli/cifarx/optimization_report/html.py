"""Renders the result of a search as a self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from markupsafe import Markup

from cifarx.optimization_report.columns import Column, columns, summary_lines, title, verdict
from cifarx.optimization_report.plot import describe_direction, render_front
from cifarx_export.html_report import render_page
from cifarx_export.optimization.results import CandidateResult, OptimizationReport
from cifarx_export.optimization.study import REPORT
from cifarx_serve.files.atomic import atomic_path

_TEMPLATE: Final = "optimization_report.html"


def render_html_report(report: OptimizationReport) -> str:
    """Return the page as text. The result depends only on `report`."""
    shown = columns(report.results)
    measured = [result for result in report.results if result.is_measured]
    return render_page(
        "cifarx.optimization_report",
        _TEMPLATE,
        {},
        report=report,
        title=title(report),
        summary=summary_lines(report),
        direction=describe_direction(report.prefer),
        plot=Markup(render_front(report)) if measured else None,
        headings=[column.heading for column in shown],
        measured=[_row(report, result, shown) for result in measured],
        left_out=[result for result in report.results if not result.is_measured],
        machine=report.environment,
    )


def write_html_report(report: OptimizationReport) -> Path:
    """Write the page into the directory of the study, atomically, and return its path.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(report.study) / REPORT
    with atomic_path(path) as temporary:
        temporary.write_text(render_html_report(report), encoding="utf-8")
    return path


def _row(report: OptimizationReport, result: CandidateResult, shown: Sequence[Column]) -> tuple[str, str, list[str]]:
    """Return the name, the verdict and the figures of a candidate."""
    return result.name, verdict(report, result), [column.text(result) for column in shown]
