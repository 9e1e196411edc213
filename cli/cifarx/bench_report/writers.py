"""A benchmark as a table on the terminal, and as a file: JSON, CSV, Markdown, a page, a picture."""

import csv
import io
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cifarx.output.console import result, table, table_width
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow
from cifarx_serve.errors import UsageError
from cifarx_serve.files.atomic import atomic_path, require_writable
from cifarx_serve.system.environment import Environment

HEADINGS: Final = (
    "file", "provider", "precision", "batch", "p50 µs", "p90 µs", "p99 µs", "device µs", "samples", "images/s",
    "agreement", "accuracy", "load ms", "first ms", "KB", "peak MB",
)  # fmt: skip

_DRAWN: Final = (".html", ".png")

_LESS: Final = frozenset({"precision", "p90 µs", "samples", "accuracy", "load ms", "first ms", "KB", "peak MB"})
_WIDE: Final = 170

_DEVICE: Final = "device µs"

UNSTABLE: Final = "~"
"""Before the p50 of a row whose last windows did not agree."""

_SINGLE_STREAM_BATCH: Final = 1


class Scenario(NamedTuple):
    """One file's figures in the terms of MLPerf Inference; None where batch 1 was not measured.

    Attributes:
        single_stream_us: latency at batch 1 that 90 % of the calls keep.
        offline: the most images a second.
        batch: the batch size that gives them.
    """

    file: str
    single_stream_us: float | None
    offline: float
    batch: int


def require_report(path: Path) -> None:
    """Find out before long work whether a report of that name can be written.

    Raises:
        UsageError: no report has such a suffix.
        OutputError: its folder cannot be written.
        ModuleNotFoundError: what draws it is not installed.
    """
    if path.suffix not in _WRITERS:
        raise UsageError(f"report {path}", f"give a name that ends in {', '.join(_WRITERS)}")
    require_writable(path.parent)
    if path.suffix in _DRAWN:
        import_module("matplotlib")


def print_report(report: BenchmarkReport) -> None:
    """The table, the scenarios, then where it was measured; a narrow terminal gets the columns that matter most."""
    wide = table_width() >= _WIDE
    shown = [position for position in _columns(report) if wide or HEADINGS[position] not in _LESS]
    table(title(report), [HEADINGS[position] for position in shown], _table(report, shown))
    for line in [*scenario_lines(report), *_remarks(report), environment_line(report.environment)]:
        result(line)


def write_report(report: BenchmarkReport, path: Path) -> None:
    """By the suffix; whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        _WRITERS[path.suffix](report, temporary)


def has_device_times(report: BenchmarkReport) -> bool:
    """Whether some file ran on a device that tells its time."""
    return any(row.device_us is not None for row in report.rows)


def title(report: BenchmarkReport) -> str:
    """What the figures are."""
    return f"one call, host memory to host memory; agreement on {report.images:,} images of {report.data}"


def scenarios(report: BenchmarkReport) -> list[Scenario]:
    """One a file, in the report's order."""
    by_file: dict[str, list[BenchmarkRow]] = {}
    for row in report.rows:
        by_file.setdefault(row.file, []).append(row)
    found = []
    for file, rows in by_file.items():
        single = next((row.p90_us for row in rows if row.batch == _SINGLE_STREAM_BATCH), None)
        best = max(rows, key=lambda row: row.images_per_s)
        found.append(Scenario(file, single, best.images_per_s, best.batch))
    return found


def scenario_lines(report: BenchmarkReport) -> list[str]:
    """The best file of each scenario."""
    found = scenarios(report)
    offline = max(found, key=lambda one: one.offline)
    lines = [f"Offline: {offline.file}, {offline.offline:,.0f} images/s at batch {offline.batch}"]
    timed = [(one.single_stream_us, one.file) for one in found if one.single_stream_us is not None]
    if timed:
        latency, file = min(timed)
        lines.insert(0, f"SingleStream: {file}, {latency:,.0f} µs at the 90th percentile")
    return lines


def cells(row: BenchmarkRow) -> tuple[str, ...]:
    """A row as text, a cell a heading."""
    return (
        row.file,
        row.provider,
        row.precision,
        str(row.batch),
        f"{'' if row.stable else UNSTABLE}{row.p50_us:,.0f}",
        f"{row.p90_us:,.0f}",
        f"{row.p99_us:,.0f}",
        "" if row.device_us is None else f"{row.device_us:,.0f}",
        f"{row.samples:,}",
        f"{row.images_per_s:,.0f}",
        f"{row.agreement:.2%}",
        "" if row.accuracy is None else f"{row.accuracy:.2%}",
        f"{row.load_ms:,.0f}",
        f"{row.first_call_ms:,.1f}",
        f"{row.size_bytes / 1000:,.0f}",
        f"{row.peak_bytes / 1e6:,.0f}",
    )


def markdown(report: BenchmarkReport) -> str:
    """A Markdown table, its title above, the scenarios and the environment below."""
    shown = _columns(report)
    headings = " | ".join(HEADINGS[position] for position in shown)
    lines = [title(report), "", f"| {headings} |", f"|{' --- |' * 3}{' ---: |' * (len(shown) - 3)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in _table(report, shown)]
    below = [*scenario_lines(report), *_remarks(report), environment_line(report.environment)]
    return "\n\n".join(["\n".join(lines), *below])


def environment_line(found: Environment) -> str:
    """The machine and the libraries, on one line."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    gpus = f", {', '.join(found.gpus)}" if found.gpus else ""
    clock = f" at {found.clock_mhz:,.0f} MHz" if found.clock_mhz else ""
    return f"{found.cpu}{clock}, {found.threads} of {found.cpus} CPUs{gpus}; Python {found.python}, {versions}"


def _columns(report: BenchmarkReport) -> list[int]:
    """The positions of the headings that have something below them."""
    return [position for position, name in enumerate(HEADINGS) if name != _DEVICE or has_device_times(report)]


def _table(report: BenchmarkReport, shown: Sequence[int]) -> list[list[str]]:
    return [[cells(row)[position] for position in shown] for row in report.rows]


def _remarks(report: BenchmarkReport) -> list[str]:
    lines = []
    if has_device_times(report):
        lines.append(f"{_DEVICE}: events around the run alone, input already on the device; the p50 has the copies")
    if not all(row.stable for row in report.rows):
        lines.append(f"{UNSTABLE} the last three windows differ by more than 10 %: measure again on a quiet machine")
    return lines


def _write_json(report: BenchmarkReport, path: Path) -> None:
    path.write_text(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n", encoding="utf-8")


def _write_csv(report: BenchmarkReport, path: Path) -> None:
    """A row a row, as in the JSON, without the percentiles."""
    rows = [msgspec.structs.asdict(row) for row in report.rows]
    left_out = {"percentiles_us"} if has_device_times(report) else {"percentiles_us", "device_us"}
    names = [name for name in rows[0] if name not in left_out]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def _write_markdown(report: BenchmarkReport, path: Path) -> None:
    path.write_text(markdown(report) + "\n", encoding="utf-8")


def _write_page(report: BenchmarkReport, path: Path) -> None:
    from cifarx.bench_report.html import benchmark_page

    path.write_text(benchmark_page(report), encoding="utf-8")


def _write_picture(report: BenchmarkReport, path: Path) -> None:
    from cifarx.bench_report.plots import write_png

    write_png(report, path)


_WRITERS: Final[dict[str, Callable[[BenchmarkReport, Path], None]]] = {
    ".json": _write_json,
    ".csv": _write_csv,
    ".md": _write_markdown,
    ".html": _write_page,
    ".png": _write_picture,
}
