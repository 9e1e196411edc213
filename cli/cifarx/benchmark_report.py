"""A benchmark as a table on the terminal, as JSON, and as Markdown."""

from pathlib import Path
from typing import Final

import msgspec

from cifarx.console import result, table, table_width
from cifarx_serve.atomic import atomic_path
from cifarx_serve.benchmark import BenchmarkReport, BenchmarkRow
from cifarx_serve.environment import Environment
from cifarx_serve.errors import UsageError

_SUFFIXES: Final = (".json", ".md")

HEADINGS: Final = (
    "file", "provider", "precision", "batch", "p50 µs", "p90 µs", "p99 µs", "images/s", "agreement", "load ms", "KB",
)  # fmt: skip

_LESS: Final = frozenset({"precision", "p90 µs", "load ms", "KB"})
_WIDE: Final = 130


def check_suffix(path: Path) -> None:
    """Raises UsageError, before anything is measured, where a report of that kind cannot be written."""
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"report {path}", f"give a name that ends in {' or '.join(_SUFFIXES)}")


def print_report(report: BenchmarkReport) -> None:
    """The table, then where it was measured; a narrow terminal gets the columns that matter most."""
    wide = table_width() >= _WIDE
    shown = [position for position, name in enumerate(HEADINGS) if wide or name not in _LESS]
    rows = [[cells(row)[position] for position in shown] for row in report.rows]
    table(title(report), [HEADINGS[position] for position in shown], rows)
    result(environment_line(report.environment))


def write_report(report: BenchmarkReport, path: Path) -> None:
    """As JSON or Markdown, by the suffix."""
    if path.suffix == ".json":
        text = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    else:
        text = markdown(report)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def title(report: BenchmarkReport) -> str:
    """What the figures are."""
    return f"one call, host memory to host memory; agreement on {report.images:,} images of {report.data}"


def cells(row: BenchmarkRow) -> tuple[str, ...]:
    """A row as text, a cell a heading."""
    return (
        row.file,
        row.provider,
        row.precision,
        str(row.batch),
        f"{row.p50_us:,.0f}",
        f"{row.p90_us:,.0f}",
        f"{row.p99_us:,.0f}",
        f"{row.images_per_s:,.0f}",
        f"{row.agreement:.2%}",
        f"{row.load_ms:,.0f}",
        f"{row.size_bytes / 1000:,.0f}",
    )


def markdown(report: BenchmarkReport) -> str:
    """A Markdown table, its title above and the environment below."""
    lines = [title(report), "", f"| {' | '.join(HEADINGS)} |", f"|{' --- |' * 3}{' ---: |' * (len(HEADINGS) - 3)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in report.rows]
    return "\n".join([*lines, "", environment_line(report.environment)])


def environment_line(found: Environment) -> str:
    """The machine and the libraries, on one line."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    gpus = f", {', '.join(found.gpus)}" if found.gpus else ""
    return f"{found.cpu}, {found.threads} of {found.cpus} CPUs{gpus}; Python {found.python}, {versions}"
