"""Prints results to standard output, and notes and errors to standard error."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 200


def is_main_process() -> bool:
    """Return whether this is the only process or, under torchrun, the one with rank 0."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """Print a line to standard error, in the main process only."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)  # noqa: T201


def print_error(message: str) -> None:
    """Print an error to standard error, in any process."""
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201


def result(text: str) -> None:
    """Print lines to standard output, in the main process only."""
    if is_main_process():
        print(text, flush=True)  # noqa: T201


def json_result(value: Any) -> None:
    """Print one indented JSON document to standard output. NaN and infinity become null."""
    result(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def tick(passed: bool | None) -> str:
    """Return a mark that is readable without colors, and in ASCII if standard output needs it.

    None is neither passed nor failed.
    """
    encoding = (sys.stdout.encoding or "ascii").lower()
    if not encoding.startswith("utf"):
        return "?   " if passed is None else "ok  " if passed else "FAIL"
    return "?" if passed is None else "✓" if passed else "✗"


def table_width() -> int:
    """Return the number of characters per line of a table on standard output."""
    return _console().width


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output; its first two columns are text, which is wrapped, and the others numbers."""
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

    # A pipe has no width, for which rich would use 80 columns and truncate the table.
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
