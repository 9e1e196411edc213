"""Read class names from the metadata of a file that another program wrote."""

import ast
import json
from collections.abc import Mapping
from typing import Any, Final

KEYS: Final = ("names", "class_names", "classes", "labels", "id2label", "class_to_idx", "idx_to_class")
"""The keys under which programs store class names; `names` is that of Ultralytics."""

_MAX_LENGTH: Final = 1 << 20


def find_class_names(metadata: Mapping[str, str], count: int) -> tuple[str, ...] | None:
    """Return the class names in the metadata of a file, or None if it has none for this number of classes.

    A value can be JSON or a literal of Python, a list or a dict of names and indices, or names with commas between.
    """
    for key in KEYS:
        names = _names(metadata.get(key, "")[:_MAX_LENGTH])
        if names is not None and len(names) == count and all(names):
            return names
    return None


def _names(text: str) -> tuple[str, ...] | None:
    value = _parse(text)
    if isinstance(value, dict):
        value = _in_order(value)
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    return None


def _in_order(names: dict[Any, Any]) -> list[Any] | None:
    """Return the names of a dict from index to name, or from name to index, in the order of the indices."""
    pairs = names.items() if all(isinstance(name, str) for name in names.values()) else [
        (index, name) for name, index in names.items()
    ]  # fmt: skip
    try:
        by_index = {int(index): name for index, name in pairs}
    except (TypeError, ValueError):
        return None
    return [by_index[index] for index in sorted(by_index)] if sorted(by_index) == list(range(len(names))) else None


def _parse(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):  # neither runs any code
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return [name.strip() for name in text.split(",")]
