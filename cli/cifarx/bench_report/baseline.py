"""Compares a benchmark report with an earlier one and finds the rows that became slower."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec

from cifarx.bench_report.summary import UNSTABLE
from cifarx.output.console import result, table, tick
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.system.environment import Environment

DEFAULT_LIMIT: Final = "10%"

_CREATE_BASELINE: Final = "create one with `cifarx bench FILE... --report baseline.json`"
_LARGEST_BYTES: Final = 2**26

_MAX_LISTED: Final = 3
"""Maximum number of rows without a counterpart that are listed by name."""

_Key: TypeAlias = tuple[str, str, str, str, int]


class BaselineRow(msgspec.Struct, frozen=True):
    """The fields of an earlier row that a comparison needs; reports of every version have them."""

    file: str
    backend: str
    provider: str
    precision: str
    batch: int
    p50_us: float


class Baseline(msgspec.Struct, frozen=True):
    """An earlier report, written by `cifarx bench --report x.json`."""

    environment: Environment
    rows: tuple[BaselineRow, ...]


class Change(msgspec.Struct, frozen=True):
    """The change of one row between two reports.

    Attributes:
        change: the relative change of the median latency: 0.1 is 10 % slower.
        regressed: whether the change exceeds the limit.
        stable: whether the new measurement was stable.
    """

    file: str
    backend: str
    provider: str
    precision: str
    batch: int
    before_us: float
    now_us: float
    change: float
    regressed: bool
    stable: bool


class Comparison(NamedTuple):
    """The changes of the rows that both reports have; `only_before` and `only_now` name the other rows."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_now: tuple[str, ...]
    same_machine: bool

    @property
    def passed(self) -> bool:
        """Whether no row regressed."""
        return not any(change.regressed for change in self.changes)


def parse_limit(text: str) -> float:
    """Parse a percentage such as `10%` or `10` into a fraction, 0.1.

    Raises:
        UsageError: the text is not a number, or the number is negative.
    """
    try:
        limit = float(text.strip().removesuffix("%")) / 100
    except ValueError as error:
        raise UsageError(f"maximum regression {text!r} is not a percentage", "give one such as 10%") from error
    if not (math.isfinite(limit) and limit >= 0):
        raise UsageError(f"maximum regression {text!r} is negative or not finite", "give 0% or more")
    return limit


def read_baseline(path: Path) -> Baseline:
    """Read an earlier report.

    Raises:
        UsageError: the file does not exist.
        ModelFileError: the file is not a report.
    """
    if not path.is_file():
        raise UsageError(f"no such baseline {path}", _CREATE_BASELINE)
    if (size := path.stat().st_size) > _LARGEST_BYTES:
        raise ModelFileError(
            f"baseline {path} has {size:,} bytes, too many for a report", "give a JSON report of `cifarx bench`"
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=Baseline)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(f"baseline {path} is not a report ({error})", _CREATE_BASELINE) from error


def compare(report: BenchmarkReport, baseline: Baseline, limit: float) -> Comparison:
    """Compare rows of the same file, backend, provider, precision and batch size.

    Args:
        report: the new report.
        baseline: the earlier report.
        limit: the largest relative increase of the median latency that passes: 0.1 is 10 %.

    Raises:
        UsageError: the two have no row in common.
    """
    before = {_key(row): row for row in baseline.rows}
    now = {_key(row): row for row in report.rows}
    changes = [_change(before[key], row, limit) for key, row in now.items() if key in before]
    if not changes:
        raise UsageError(
            "the baseline has none of these rows", "measure the same files with the same --batch and --device"
        )
    earlier, current = baseline.environment, report.environment
    return Comparison(
        tuple(changes),
        tuple(_name(key) for key in before if key not in now),
        tuple(_name(key) for key in now if key not in before),
        (earlier.cpu, earlier.threads, earlier.gpus) == (current.cpu, current.threads, current.gpus),
    )


def print_comparison(comparison: Comparison, limit: float) -> None:
    """Print a table of the changes, and name the rows that could not be compared."""
    rows = [
        [
            change.file,
            change.provider,
            str(change.batch),
            f"{change.before_us:,.0f}",
            f"{'' if change.stable else UNSTABLE}{change.now_us:,.0f}",
            f"{change.change:+.1%}",
            tick(not change.regressed),
        ]
        for change in comparison.changes
    ]
    headings = ("file", "provider", "batch", "p50 µs before", "now", "change", "")
    table(f"against the baseline: at most {limit:+.0%}", headings, rows)
    for line in comparison_remarks(comparison):
        result(line)


def comparison_remarks(comparison: Comparison) -> list[str]:
    """Return the lines that qualify the changes: another machine, or rows without a counterpart."""
    lines = []
    if not comparison.same_machine:
        lines.append("the baseline was measured on another machine, so the times are not comparable")
    if comparison.only_before:
        lines.append(f"only in the baseline: {_list_names(comparison.only_before)}")
    if comparison.only_now:
        lines.append(f"not in the baseline: {_list_names(comparison.only_now)}")
    return lines


def _list_names(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _key(row: BaselineRow | BenchmarkRow) -> _Key:
    return row.file, row.backend, row.provider, row.precision, row.batch


def _name(key: _Key) -> str:
    file, _, provider, _, batch = key
    return f"{file} on {provider} at batch {batch}"


def _change(before: BaselineRow, now: BenchmarkRow, limit: float) -> Change:
    change = now.p50_us / before.p50_us - 1 if before.p50_us > 0 else math.inf
    return Change(*_key(now), before.p50_us, now.p50_us, change, change > limit, now.stable)
