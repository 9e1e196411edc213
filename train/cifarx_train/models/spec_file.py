"""Read a spec, or a part of one, that the user wrote as TOML or JSON."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from cifarx_serve.errors import SpecError, UsageError, error_message, unknown_name_error
from cifarx_serve.files.regular_file import read_text_file
from cifarx_serve.spec import SCHEMA_VERSION, InputSpec, ModelSource, ModelSpec
from cifarx_train.models.options import SpecOverrides

_OLD_INPUT_FIELDS: Final = {"colour": "color"}  # of schema 1, in which `resize` was the interpolation
_SETTABLE: Final = frozenset(
    {"class_names", "input", "output", "activation", "outputs", "thresholds", "temperature", "source"}
)
"""The fields that the user states. The others describe one file."""

_TABLES: Final = frozenset({"input", "source"})
"""Those of the fields that can be stated in part."""


def read_spec_file(path: Path) -> SpecOverrides:
    """Return the fields of a spec document that state what a network takes and gives.

    The document can be one that `cifarx inspect --json` printed, of any schema, or a part of one. Fields that describe
    a particular file, such as checksums, are not used. An `input` that states the size describes the preprocessing
    completely. A `source`, or `model` alone, names the network, for a command whose `--model` does not.

    Raises:
        UsageError: the file cannot be read, or has an unknown field.
        SpecError: a field has a wrong type or value.
    """
    document = _upgrade(read_document(path), path)
    _require_known(document, ModelSpec, path)
    fields = {name: value for name, value in document.items() if name in _SETTABLE and value is not None}
    input_ = fields.get("input", {})
    _require_known(input_, InputSpec, path)
    _require_types({name: value for name, value in fields.items() if name not in _TABLES}, ModelSpec, path)
    _require_types(input_, InputSpec, path)
    network: Mapping[str, Any] = {"kind": "builtin", "name": document["model"]} if "model" in document else {}
    if "source" in fields:
        network = fields["source"]
        _require_known(network, ModelSource, path)
        fields["source"] = {"output": network.get("output")}
    origins = dict.fromkeys([*fields, *(["network"] if network else [])], f"--spec {path}")
    return SpecOverrides(fields, {"height", "width"} <= input_.keys(), origins, network)


def read_input_file(path: Path) -> Mapping[str, Any]:
    """Return the fields of an `InputSpec`, from a document of these fields or from a spec document.

    Raises:
        UsageError: the file cannot be read, or has an unknown field.
        SpecError: a field has a wrong type or value.
    """
    document = read_document(path)
    if "input" in document:
        stated: Mapping[str, Any] = read_spec_file(path).fields.get("input", {})
        return stated
    _require_known(document, InputSpec, path)
    _require_types(document, InputSpec, path)
    return document


def read_document(path: Path) -> dict[str, Any]:
    """Return the content of a JSON or TOML file.

    Raises:
        UsageError: the file cannot be read, or is neither.
    """
    try:
        text = read_text_file(path)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read {path} ({error_message(error)})", "give a TOML or JSON file") from error
    try:
        document = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is neither JSON nor TOML ({error_message(error)})",
            "write it like `cifarx inspect FILE --spec-template` does",
        ) from error
    assert isinstance(document, dict), "an object and a TOML document are dicts"
    return document


def _upgrade(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a document of an older schema with the current names of its fields."""
    version = document.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UsageError(
            f"{path} has spec schema {version}, but this cifarx reads only up to {SCHEMA_VERSION}",
            "install a newer cifarx",
        )
    input_ = document.get("input")
    if version > 1 or not isinstance(input_, dict):
        return document
    upgraded = {_OLD_INPUT_FIELDS.get(name, name): value for name, value in input_.items()}
    if "resize" in upgraded:
        upgraded["interpolation"] = upgraded.pop("resize")
    return {**document, "input": upgraded}


def _require_known(fields: object, kind: Any, path: Path) -> None:
    known = kind.__struct_fields__
    if not isinstance(fields, dict):
        raise UsageError(f"{path} has {fields!r} instead of a table", "write a table of fields")
    for name in fields:
        if name not in known:
            raise unknown_name_error(f"field in {path}", name, known)


def _require_types(fields: Mapping[str, Any], kind: type[msgspec.Struct], path: Path) -> None:
    """Check the value of each field alone: whether they fit together shows only in the whole spec."""
    for field in msgspec.structs.fields(kind):
        try:
            if field.name in fields:
                msgspec.convert(fields[field.name], field.type)
        except (msgspec.ValidationError, RecursionError) as error:
            raise SpecError(f"{path} has an invalid {field.name} ({error})", "correct that field") from error
