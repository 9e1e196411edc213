"""What a user sees: results on standard output, progress and notes on standard error."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 200


def speaks() -> bool:
    """Whether this process is the one that speaks: of several that torchrun started, the first."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """One line on standard error."""
    if speaks():
        failure(message)


def failure(message: str) -> None:
    """One line on standard error, from whichever process it happened in."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201


def result(text: str) -> None:
    """Lines on standard output."""
    if speaks():
        print(text, flush=True)  # noqa: T201


def json_result(value: Any) -> None:
    """One indented JSON document on standard output; numbers that are not finite become null."""
    result(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def tick(passed: bool) -> str:
    """A mark that survives a terminal without colours."""
    encoding = (sys.stdout.encoding or "ascii").lower()
    if not encoding.startswith("utf"):
        return "ok  " if passed else "FAIL"
    return "✓" if passed else "✗"


def table_width() -> int:
    """Characters that a table on standard output may take."""
    return _console().width


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: two columns of text, folded where the terminal is narrow, then numbers."""
    from rich import box
    from rich.table import Table

    grid: Table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for position, heading in enumerate(headings):
        text = position < 2
        grid.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    _console().print(grid)


def _console() -> "Console":
    from rich.console import Console

    # A pipe has no width, and rich would cut the table to 80 columns.
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
