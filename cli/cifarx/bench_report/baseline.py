"""A benchmark against an earlier one: what became slower, and by how much."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec

from cifarx.output.console import result, table, tick
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.system.environment import Environment

DEFAULT_LIMIT: Final = "10%"

_LARGEST_BYTES: Final = 2**26

_NAMED: Final = 3
"""Rows without a counterpart that are named."""

_Key: TypeAlias = tuple[str, str, str, str, int]


class BaselineRow(msgspec.Struct, frozen=True):
    """What of an earlier row is compared; any report has it."""

    file: str
    backend: str
    provider: str
    precision: str
    batch: int
    p50_us: float


class Baseline(msgspec.Struct, frozen=True):
    """An earlier report, as `cifarx bench --report x.json` wrote it."""

    environment: Environment
    rows: tuple[BaselineRow, ...]


class Change(msgspec.Struct, frozen=True):
    """One row then and now; `change` is that of the median latency, 0.1 for a tenth more. `regressed`: too much."""

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
    """Of the rows that both have; `only_before` and `only_now` name the others."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_now: tuple[str, ...]
    same_machine: bool

    @property
    def passed(self) -> bool:
        """Whether nothing regressed."""
        return not any(change.regressed for change in self.changes)


def parse_limit(text: str) -> float:
    """`10%` or `10` as a share, 0.1.

    Raises:
        UsageError: it is no number, or below zero.
    """
    try:
        limit = float(text.strip().removesuffix("%")) / 100
    except ValueError as error:
        raise UsageError(f"regression of {text!r}", "give per cent, such as 10%") from error
    if not (math.isfinite(limit) and limit >= 0):
        raise UsageError(f"regression of {text!r}", "give 0% or more")
    return limit


def read_baseline(path: Path) -> Baseline:
    """An earlier report.

    Raises:
        UsageError: there is no such file.
        ModelFileError: it is not a report.
    """
    if not path.is_file():
        raise UsageError(f"no such baseline {path}", "make one with `cifarx bench FILE... --report baseline.json`")
    if (size := path.stat().st_size) > _LARGEST_BYTES:
        raise ModelFileError(f"baseline {path} has {size:,} bytes", "give a report of `cifarx bench`")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Baseline)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"baseline {path} is no report ({error})", "make one with `cifarx bench FILE... --report baseline.json`"
        ) from error


def compare(report: BenchmarkReport, baseline: Baseline, limit: float) -> Comparison:
    """Compare rows of the same file, backend, provider, precision and batch size.

    Args:
        report: now.
        baseline: then.
        limit: the greatest growth of the median latency that is let pass, as a share.

    Raises:
        UsageError: they have no row in common.
    """
    before = {_key(row): row for row in baseline.rows}
    now = {_key(row): row for row in report.rows}
    changes = [_change(before[key], row, limit) for key, row in now.items() if key in before]
    if not changes:
        raise UsageError(
            "the baseline has none of these rows", "measure the same files with the same --batch and --device"
        )
    then, here = baseline.environment, report.environment
    return Comparison(
        tuple(changes),
        tuple(_name(key) for key in before if key not in now),
        tuple(_name(key) for key in now if key not in before),
        (then.cpu, then.threads, then.gpus) == (here.cpu, here.threads, here.gpus),
    )


def print_comparison(comparison: Comparison, limit: float) -> None:
    """A table of the changes, and what could not be compared."""
    rows = [
        [
            change.file,
            change.provider,
            str(change.batch),
            f"{change.before_us:,.0f}",
            f"{'' if change.stable else '~'}{change.now_us:,.0f}",
            f"{change.change:+.1%}",
            tick(not change.regressed),
        ]
        for change in comparison.changes
    ]
    headings = ("file", "provider", "batch", "p50 µs before", "now", "change", "")
    table(f"against the baseline: at most {limit:+.0%}", headings, rows)
    for line in remarks(comparison):
        result(line)


def remarks(comparison: Comparison) -> list[str]:
    """What a reader of the changes must know."""
    lines = []
    if not comparison.same_machine:
        lines.append("the baseline was measured on another machine: its times say little about these")
    if comparison.only_before:
        lines.append(f"only in the baseline: {_some(comparison.only_before)}")
    if comparison.only_now:
        lines.append(f"not in the baseline: {_some(comparison.only_now)}")
    return lines


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _key(row: BaselineRow | BenchmarkRow) -> _Key:
    return row.file, row.backend, row.provider, row.precision, row.batch


def _name(key: _Key) -> str:
    file, _, provider, _, batch = key
    return f"{file} on {provider} at batch {batch}"


def _change(before: BaselineRow, now: BenchmarkRow, limit: float) -> Change:
    grown = now.p50_us / before.p50_us - 1 if before.p50_us > 0 else math.inf
    return Change(*_key(now), before.p50_us, now.p50_us, grown, grown > limit, now.stable)
