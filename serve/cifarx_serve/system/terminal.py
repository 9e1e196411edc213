"""Makes text safe to print and to write into a report: names in a file, and names of files, can contain anything.

Control characters move the cursor, change the title of the window or start a line that looks like one of cifarx.
Bidirectional controls reorder the text around them. A surrogate stands for a byte of a file name that is not UTF-8,
and cannot be encoded.
"""

import os
import re
from typing import Final

from cifarx_serve.errors import UsageError

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"

# C1 controls; bidirectional marks, embeddings, overrides and isolates; line and paragraph separators; surrogates; and
# two code points that XML cannot hold.
_UNSAFE_AFTER_ASCII: Final = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"
_UNSAFE: Final = f"[\x00-\x1f{_UNSAFE_AFTER_ASCII}]"
_UNSAFE_IN_JSON: Final = f"[{_UNSAFE_AFTER_ASCII}]"
_SURROGATES: Final = "[\ud800-\udfff]"


def printable(text: str) -> str:
    """Return text on one line, in which a replacement character stands for each character that is not safe to print."""
    # Most text is printable by Python's strict definition. That is faster to find out than to compile the pattern.
    return text if text.isprintable() else re.sub(_UNSAFE, _REPLACEMENT, text)


def encodable(text: str) -> str:
    """Return text that can be encoded in UTF-8: a replacement character stands for each byte that was not UTF-8."""
    return text if text.isprintable() else re.sub(_SURROGATES, _REPLACEMENT, text)


def require_utf8(*paths: str | os.PathLike[str] | None) -> None:
    """Check that paths can be written into a JSON document, such as a report or a message to another process.

    Raises:
        UsageError: a path is not valid UTF-8.
    """
    for path in paths:
        if path is not None and encodable(os.fspath(path)) != os.fspath(path):
            raise UsageError(f"the path {os.fspath(path)} is not valid UTF-8", "rename the file or its directory")


def printable_json(document: str) -> str:
    """Return a JSON document in which characters that are not safe to print are escaped. Its values stay the same."""
    return re.sub(_UNSAFE_IN_JSON, lambda match: f"\\u{ord(match[0]):04x}", document)
