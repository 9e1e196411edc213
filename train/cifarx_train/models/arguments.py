"""Parse the arguments of a network's class or function that the user gives as text."""

import ast
import json
from collections.abc import Sequence
from math import isfinite
from typing import Any

from cifarx_serve.errors import UsageError


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Return keyword arguments from texts such as `width=64`, `depths=[2,2]` or `name=small`.

    Raises:
        UsageError: a text is not KEY=VALUE, or gives a key again.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.isidentifier()):
            raise UsageError(f"--model-arg {text} is not KEY=VALUE", "write it like --model-arg width=64")
        if key in arguments:
            raise UsageError(f"--model-arg {key} was given twice", "give it once")
        arguments[key] = parse_value(value)
    return arguments


def parse_value(text: str) -> Any:
    """Return the value of a literal of JSON or Python, or the text itself if it is neither.

    Only values that JSON can express are returned, because the spec records them: tuples become lists.
    """
    for parse in (json.loads, ast.literal_eval):
        try:
            value = _plain(parse(text))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return value
    return text


def _plain(value: Any) -> Any:
    """Return a value with lists in place of tuples.

    Raises:
        TypeError: JSON cannot express the value.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float() if isfinite(value):
            return value
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
    raise TypeError(value)
