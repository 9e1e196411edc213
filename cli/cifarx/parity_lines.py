"""A proof as lines to read: a verdict, then each check with a tick or a cross."""

from cifarx.console import tick
from cifarx_export.parity_report import ParityReport


def parity_lines(report: ParityReport) -> str:
    """The report of one artifact, without a final newline."""
    summary = report.summary
    verdict = "proved" if summary.passed else "NOT proved"
    lines = [
        f"{tick(summary.passed)} {report.artifact}: {report.format} {report.precision} {verdict} against "
        f"{report.checkpoint} on {summary.images} images of {summary.data}, {summary.provider}"
    ]
    lines += [f"    {tick(check.passed)} {check.name:<14} {check.found}" for check in report.checks]
    if summary.required_tolerance is not None:
        lines.append(
            f"      errors         max {summary.max_abs_error:.2e}, mean {summary.mean_abs_error:.2e}, 99.9th "
            f"percentile {summary.p999_abs_error:.2e}; a tolerance of {summary.required_tolerance:.2e} would pass"
        )
    if summary.reference_accuracy is not None and summary.accuracy is not None:
        lines.append(f"      accuracy       {summary.accuracy:.2%}, the checkpoint {summary.reference_accuracy:.2%}")
    return "\n".join(lines)
