"""Parse the values of the options that describe a network and its images."""

import json
import tomllib
from collections.abc import Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any

from cifarx_serve.errors import UsageError, error_message
from cifarx_serve.files.regular_file import read_text_file


def parse_image_size(text: str) -> tuple[int, int]:
    """Return the height and width of `224` or `224x160`.

    Raises:
        UsageError: the text is neither.
    """
    height, x, width = text.lower().partition("x")
    sides = (height, width if x else height)
    if not all(side.isascii() and side.isdigit() and 0 < int(side) < 2**16 for side in sides):
        raise UsageError(
            f"--image-size {text} is not a valid size", "use pixels, such as --image-size 224, or HEIGHTxWIDTH"
        )
    return int(sides[0]), int(sides[1])


def parse_classes(text: str) -> list[str]:
    """Return class names from a list separated by commas, or from a file.

    A file has one name per line, or is a JSON list of names, or a JSON object from names to labels (as ImageFolder's
    `class_to_idx`) or from labels to names (as Hugging Face's `id2label`).

    Raises:
        UsageError: the file cannot be read, or there are fewer than two names, or an empty one.
    """
    if _is_file(text):
        names = _read_classes(Path(text))
    elif "," in text:
        names = [name.strip() for name in text.split(",")]
    else:
        raise UsageError(f"--classes {text} is no file", "give a file, or names separated by commas, such as cat,dog")
    if len(names) < 2 or not all(names):
        what = "an empty name" if len(names) > 1 else f"only {len(names)} name"
        raise UsageError(f"--classes {text} has {what}", "give at least two names, none of them empty")
    return names


def _read_classes(path: Path) -> list[str]:
    try:
        text = read_text_file(path).removeprefix("\ufeff")  # of editors on Windows
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read --classes {path} ({error_message(error)})", "give a text file") from error
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = _class_list(json.loads(text))
    except (ValueError, RecursionError):
        names = None
    if names is None:
        raise UsageError(
            f"--classes {path} is no JSON list of names and no class_to_idx", "write one class name per line"
        )
    return names


def _class_list(document: object) -> list[str] | None:
    """Return the names of a JSON list, of a dict from names to labels, or of a dict from labels to names."""
    if isinstance(document, list):
        return document if all(isinstance(name, str) for name in document) else None
    if not isinstance(document, dict):
        return None
    if all(isinstance(name, str) and label.isdigit() for label, name in document.items()):
        document = {name: int(label) for label, name in document.items()}
    labels = list(document.values())
    if any(type(label) is not int for label in labels) or sorted(labels) != list(range(len(labels))):
        return None
    return sorted(document, key=document.__getitem__)


def parse_class_weights(text: str) -> str | dict[str, float]:
    """Return `auto`, or the weights in a file by class name.

    The file is a JSON object, a TOML document, or CSV with a name and a number per line. CSV can have a heading.

    Raises:
        UsageError: the file cannot be read, names a class twice, or has a weight that is not above 0.
    """
    if text == "auto":
        return text
    option = f"--class-weights {text}"
    if not _is_file(text):
        raise UsageError(f"{option} is no file", "give auto, or a JSON, TOML or CSV file of class names and weights")
    try:
        pairs = _read_weights(read_text_file(Path(text)).removeprefix("\ufeff"), Path(text).suffix.lower())
    except (OSError, UnicodeError, ValueError, RecursionError) as error:
        fix = "write a name and a number per line, such as cat,2.5, or a .json or .toml file"
        raise UsageError(f"cannot read {option} ({error_message(error)})", fix) from error
    weights: dict[str, float] = {}
    for name, value in pairs:
        if name in weights:
            raise UsageError(f"{option} has two weights of {name!r}", "give one for each class")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
            raise UsageError(f"{option} has the weight {value!r} of {name!r}", "give a number above 0")
        weights[name] = float(value)
    return weights


def _read_weights(text: str, suffix: str) -> Sequence[tuple[str, object]]:
    """Return names and weights in the order of a file. Raises ValueError if it is not in the format of its suffix."""
    if suffix == ".json":
        document = json.loads(text, object_pairs_hook=list)
        if not isinstance(document, list) or not all(isinstance(pair, tuple) for pair in document):
            raise ValueError("it is no object of names and numbers")
        return document
    if suffix == ".toml":
        return list(tomllib.loads(text).items())
    import csv

    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    if bad := next((row for row in rows if len(row) != 2), None):
        raise ValueError(f"a line has {len(bad)} columns, not 2")
    numbers = [(name, _number(value)) for name, value in rows]
    return numbers[1:] if numbers and isinstance(numbers[0][1], str) else numbers


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def parse_preprocessing(name: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the fields of the input for a value of `--preprocessing`.

    Raises:
        UsageError: the value is neither a name nor a file, or the file has an unknown field.
    """
    from msgspec import to_builtins

    from cifarx_serve.spec import InputSpec
    from cifarx_train.models.preprocessing import Preprocessing
    from cifarx_train.models.spec_file import read_input_file

    if name == "imagenet":
        preset = Preprocessing.imagenet(size) if size else Preprocessing.imagenet()
    elif name == "cifarx":
        preset = Preprocessing.cifarx(size) if size else Preprocessing.cifarx()
    elif _is_file(name):
        given = {"height": size[0], "width": size[1]} if size else {}
        return {**read_input_file(Path(name)), **given}
    else:
        raise UsageError(f"--preprocessing {name} is no file", "give imagenet, cifarx, or a TOML or JSON file")
    default = InputSpec(height=preset.height, width=preset.width)
    fields: dict[str, Any] = {"height": preset.height, "width": preset.width}
    for field in preset.__struct_fields__:
        if getattr(preset, field) != getattr(default, field):
            fields[field] = to_builtins(getattr(preset, field))
    return fields


def parse_numbers(option: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not all(map(isfinite, numbers)):
        raise UsageError(f"{option} {text} is not one number or three", "separate them by commas, such as 0.5,0.5,0.5")
    return numbers


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a list of names can be longer than any path
        return False
