"""Telling the caller of long work what is being done."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str], None]
"""Takes one line without a newline."""


def silent(message: str) -> None:
    """Tells nobody."""
    del message
