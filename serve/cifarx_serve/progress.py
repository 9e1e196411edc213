"""Report the progress of long operations."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str], None]
"""Called with one line of text, without a newline, for each step of the work."""


def silent(message: str) -> None:
    """Ignore the message."""
    del message
