"""Escapes names from files for the formats of reports, so that they are text there and nothing else."""

import re
from typing import Final

from cifarx_serve.system.terminal import printable

# What begins raw HTML, an entity, code, a link or an image, and separates the cells of a table.
_MARKDOWN: Final = r"[\\<>&`\[\]|]"
_ENTITIES: Final = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}

_FORMULA_STARTS: Final = ("=", "+", "-", "@")


def markdown_text(text: str) -> str:
    """Return text for a line or a table cell in Markdown."""
    return re.sub(_MARKDOWN, lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), printable(text))


def csv_cell(text: str) -> str:
    """Return text for a cell of a CSV file. An apostrophe is put before what a spreadsheet would compute.

    Source: https://owasp.org/www-community/attacks/CSV_Injection
    """
    safe = printable(text)
    return f"'{safe}" if safe.lstrip().startswith(_FORMULA_STARTS) else safe
