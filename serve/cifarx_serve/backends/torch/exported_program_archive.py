"""Check the archives of exported programs, because `torch.export.load` executes code from the file that it loads.

In torch 2.15 (`torch/export/pt2_archive/_package.py`, `torch/_export/serde/serialize.py`), a `.pt2` file can run code
when it is loaded or called in these ways:

- example inputs, script objects, and weights and constants that are in the old format or marked `use_pickle` are
  unpickled;
- sizes are expressions that SymPy evaluates as Python;
- guards are Python source code, which is executed;
- tree specs and metadata name modules to import, and operators can have any name in `torch` and `operator`;
- the names of nodes become part of Python source code, which is executed;
- compiled libraries of AOTInductor in the archive are loaded.

All of these are refused. The graph may only use the operators of `exported_program_operators`, on numbers and tensors.
Its names must be plain identifiers, and its sizes arithmetic on the batch size. A new archive is then written from the
checked members, so that PyTorch cannot find anything in the file that this module did not check.

A malicious file can still return wrong logits, or need more memory or time than is available.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from cifarx_serve.backends.base import parse_spec, require_file
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.backends.torch.exported_program_operators import is_allowed
from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.spec import ModelSpec

_Result = TypeVar("_Result")

SAMPLE_INPUTS: Final = "data/sample_inputs/model.pt"
"""Every archive has this member. It must be empty, because PyTorch would unpickle it."""

_PROGRAM: Final = "models/model.json"
_DOCUMENTS: Final = (_PROGRAM, "data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_MAX_DOCUMENT_BYTES: Final = 64 * 2**20  # the graph of the largest classifier of torchvision takes 3 MB

_MEMBER: Final = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/version|\.data/serialization_id|"
    + "|".join(map(re.escape, (*_DOCUMENTS, SAMPLE_INPUTS, f"extra/{SPEC_FILE}")))
)

_ARGUMENTS: Final = """
as_bool as_bools as_device as_expr as_float as_floats as_int as_ints as_layout as_memory_format as_name as_none
as_optional_tensor as_optional_tensors as_scalar_type as_string as_sym_int as_sym_ints as_tensor as_tensors
"""
_ARGUMENT_TYPES: Final = frozenset(_ARGUMENTS.split())
_MUST_BE_EMPTY: Final = frozenset({"metadata", "guards_code", "treespec_namedtuple_fields", "custom_obj_values"})

_KEY: Final = "a key"
_NAME: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_STATE_NAME: Final = re.compile(r"(\w[\w-]*(\.\w[\w-]*)*)?", re.ASCII)  # `0.weight`, or `block1-0` of RegNet
_DUNDER: Final = re.compile(r"(^|\.)__")
_STATE_KEYS: Final = frozenset({_KEY, "parameter_name", "buffer_name", "tensor_constant_name", "fqn"})
_STRING_PATTERNS: Final = {
    "as_float": re.compile(r"-?Infinity|NaN"),
    "as_string": re.compile(r"[\w ,.>-]*", re.ASCII),  # for example the equation of einsum, or a padding mode
    "path_name": re.compile(r"(weight|tensor)_\d+", re.ASCII),
    "torch_version": re.compile(r"[\w.+-]*", re.ASCII),
}

_LEAF: Final[dict[str, Any]] = {"type": None, "context": None, "children_spec": []}
_ONE_TENSOR_IN: Final = [
    1,
    {
        "type": "builtins.tuple",
        "context": "null",
        "children_spec": [
            {"type": "builtins.tuple", "context": "null", "children_spec": [_LEAF]},
            {"type": "builtins.dict", "context": "[]", "children_spec": []},
        ],
    },
]
_TREES: Final[dict[str, Any]] = {"in_spec": _ONE_TENSOR_IN, "out_spec": [1, _LEAF]}


class _RefusedError(Exception):
    """The content of a file is not allowed."""


def checked_archive(path: Path) -> io.BytesIO:
    """Return an archive for `torch.export.load`, written from the members of a file after each was checked.

    Raises:
        ModelFileError: the file is damaged, is not an exported program, or contains something that could run code.
    """
    members = _read_archive(path, _read_members)
    try:
        for name in _DOCUMENTS:
            members[name] = _checked_document(name, members[name])
    except _RefusedError as refusal:
        raise _refused(path, refusal) from refusal
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        for name in list(members):
            writer.writestr(f"archive/{name}", members.pop(name))
    archive.seek(0)
    return archive


def read_spec(path: Path) -> ModelSpec:
    """Return the spec of a file without PyTorch.

    Raises:
        ModelFileError: the file is missing or damaged, or contains no spec.
        SpecError: the spec is malformed or has a newer schema.
    """
    return parse_spec(_read_archive(path, _read_document), path)


def _read_document(archive: zipfile.ZipFile, size: int) -> bytes | None:
    entry = _entries_by_name(archive, size).get(f"extra/{SPEC_FILE}")
    return archive.read(entry) if entry else None


def _read_members(archive: zipfile.ZipFile, size: int) -> dict[str, bytes]:
    entries = _entries_by_name(archive, size)
    for name in (*_DOCUMENTS, SAMPLE_INPUTS):
        if name not in entries:
            raise _RefusedError(f"it has no {name}")
    for name, entry in entries.items():
        if not _MEMBER.fullmatch(name):
            raise _RefusedError(f"it has an unexpected member {name!r}")
        if name in _DOCUMENTS and entry.file_size > _MAX_DOCUMENT_BYTES:
            raise _RefusedError(f"{name} has {entry.file_size} bytes")
    if entries[SAMPLE_INPUTS].file_size:
        raise _RefusedError("it has example inputs, which PyTorch would unpickle")
    return {name: archive.read(entry) for name, entry in entries.items()}


def _entries_by_name(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the members by their names within the directory that all of them share."""
    listed = archive.infolist()
    entries = {entry.filename.partition("/")[2]: entry for entry in listed}
    if len(entries) != len(listed) or len({entry.filename.partition("/")[0] for entry in listed}) > 1:
        raise _RefusedError("its members are not in one directory, or one is duplicated")
    # PyTorch never compresses members, so the declared bytes must all be in the file.
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in listed):
        raise _RefusedError("it is compressed or encrypted")
    if sum(entry.file_size for entry in listed) > size:
        raise _RefusedError("its members declare more bytes than the file has")
    return entries


def _read_archive(path: Path, read: Callable[[zipfile.ZipFile, int], _Result]) -> _Result:
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return read(archive, path.stat().st_size)
    except _RefusedError as refusal:
        raise _refused(path, refusal) from refusal
    except Exception as error:  # the exceptions of zipfile for damaged archives have no common base class
        raise ModelFileError(
            f"{path} is not an exported program ({error_message(error)})", "export it again"
        ) from error


def _refused(path: Path, refusal: _RefusedError) -> ModelFileError:
    return ModelFileError(
        f"{path} is not an exported program of cifarx ({refusal})", "open only files from `cifarx export`"
    )


def _checked_document(name: str, content: bytes) -> bytes:
    """Parse and check a JSON document, and return it serialized again."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(f"{name} is not JSON") from error
    for key, value in _walk(document):
        _check(key, value)
    return json.dumps(document).encode()


def _walk(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, every string with the key above it, and every key itself under `_KEY`."""
    pending: list[tuple[str, Any]] = [("", document)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            yield from ((name, inner) for name, inner in value.items() if not isinstance(inner, str))
            yield from ((_KEY, name) for name in value)
            pending += value.items()
        elif isinstance(value, list):
            pending += ((key, inner) for inner in value)
        elif isinstance(value, str):
            yield key, value


def _check(key: str, value: Any) -> None:
    """Refuse a value that is not allowed under its key."""
    if key in _MUST_BE_EMPTY and value:
        raise _RefusedError(f"its {key} is not empty")
    if key == "use_pickle" and value is not False:
        raise _RefusedError("it has pickled tensors")
    if key.startswith("as_") and key not in _ARGUMENT_TYPES:
        raise _RefusedError(f"it has an argument of type {key!r}")
    if isinstance(value, str) and not _is_allowed(key, value):
        raise _RefusedError(f"{key} is {value[:60]!r}")


def _is_allowed(key: str, text: str) -> bool:
    if key == "target":
        return is_allowed(text)
    if key == "expr_str":
        return _is_size(text)
    if key in _TREES:
        return _is_tree(text, _TREES[key])
    if key in _STRING_PATTERNS:
        return _STRING_PATTERNS[key].fullmatch(text) is not None
    pattern = _STATE_NAME if key in _STATE_KEYS else _NAME
    return pattern.fullmatch(text) is not None and not _DUNDER.search(text)


def _is_tree(text: str, expected: Any) -> bool:
    try:
        return bool(json.loads(text) == expected)
    except (ValueError, RecursionError):
        return False


def _is_size(text: str) -> bool:
    """Return whether this is SymPy's form of arithmetic on integers and symbols, without evaluating it."""
    if len(text) > 1000:
        return False
    try:
        return _is_size_node(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_size_node(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    constants = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
    match node.func.id:
        case "Symbol":
            flags = [keyword.arg for keyword in node.keywords]
            true = all(isinstance(word.value, ast.Constant) and word.value.value is True for word in node.keywords)
            symbol = constants[0] if len(constants) == 1 else None
            return true and set(flags) <= {"integer", "positive"} and _is_symbol(symbol)
        case "Integer":
            return not node.keywords and len(constants) == 1 and type(constants[0]) is int
        case "Add" | "Mul" | "Min" | "Max" | "FloorDiv" | "Mod":
            return not node.keywords and all(map(_is_size_node, node.args))
    return False


def _is_symbol(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"s\d{1,4}", value, re.ASCII) is not None
