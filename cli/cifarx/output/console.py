"""Prints results to standard output, and notes and errors to standard error.

Everything that is printed as text goes through `printable`, because it can contain names from a file.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from cifarx_serve.system.terminal import encodable, printable, printable_json

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 200


def is_main_process() -> bool:
    """Return whether this is the only process or, under torchrun, the one with rank 0."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """Print a line to standard error, in the main process only."""
    if is_main_process():
        print(printable(message), file=sys.stderr, flush=True)  # noqa: T201


def print_error(message: str) -> None:
    """Print an error to standard error, in any process."""
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)  # noqa: T201


def result(*lines: str) -> None:
    """Print lines to standard output, in the main process only."""
    styled_result("\n".join(map(printable, lines)))


def styled_result(text: str) -> None:
    """Print text with colors and line breaks, whose parts are printable, as `result` does."""
    if is_main_process():
        print(text, flush=True)  # noqa: T201


def json_result(value: Any) -> None:
    """Print one indented JSON document to standard output. NaN and infinity become null."""
    styled_result(json_output(value, indent=2))


def json_output(value: Any, indent: int = 0) -> str:
    """Return a JSON document for standard output, as `json_document` does. It is ASCII if the encoding needs it."""
    document = json_document(value, indent)
    return document if can_print_unicode() else _ascii_json(document)


def json_document(value: Any, indent: int = 0) -> str:
    """Return a JSON document, on one line without an indent.

    Bytes of a file name that are not UTF-8, which JSON cannot represent, are replaced.
    """
    try:
        encoded = msgspec.json.encode(value)
    except UnicodeEncodeError:
        encoded = msgspec.json.encode(_encodable(msgspec.to_builtins(value)))
    return printable_json((msgspec.json.format(encoded, indent=indent) if indent else encoded).decode())


def _encodable(value: Any) -> Any:
    match value:
        case str():
            return encodable(value)
        case dict():
            return {_encodable(key): _encodable(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_encodable(entry) for entry in value]
    return value


def _ascii_json(document: str) -> str:
    import json  # imported here because few terminals need it

    return re.sub(r"[^\x00-\x7f]+", lambda match: json.dumps(match[0])[1:-1], document)


def can_print_unicode() -> bool:
    """Return whether standard output takes characters beyond ASCII."""
    return (sys.stdout.encoding or "ascii").lower().startswith("utf")


def tick(passed: bool | None) -> str:
    """Return a mark that is readable without colors, and in ASCII if standard output needs it.

    None is neither passed nor failed.
    """
    if not can_print_unicode():
        return "?   " if passed is None else "ok  " if passed else "FAIL"
    return "?" if passed is None else "✓" if passed else "✗"


def table_width() -> int:
    """Return the number of characters per line of a table on standard output."""
    return _console().width


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output; its first two columns are text, which is wrapped, and the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid: Table = Table(title=Text(printable(title)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for position, heading in enumerate(headings):
        text = position < 2
        grid.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in rows:
        grid.add_row(*[Text(printable(cell)) for cell in row])  # Text, because a name in brackets is no markup
    _console().print(grid)


def _console() -> "Console":
    from rich.console import Console

    # A pipe has no width, for which rich would use 80 columns and truncate the table.
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
