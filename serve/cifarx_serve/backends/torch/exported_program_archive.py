"""What is let through to `torch.export.load`, which by itself runs code that a file tells it to run.

Read in torch 2.15 (`torch/export/pt2_archive/_package.py`, `torch/_export/serde/serialize.py`), a `.pt2` file has
these ways to run code when it is loaded or called:

- example inputs, and weights and constants of the old format or marked `use_pickle`, are unpickled; script objects too;
- sizes are expressions, which SymPy evaluates as Python;
- guards are Python source, which is executed;
- tree specs and metadata name modules to import; operators are looked up by any name below `torch` and `operator`;
- names of nodes are written into Python source, which is executed;
- compiled libraries of AOTInductor in it are loaded.

None of these gets through. The graph may consist of the operators that image classifiers are made of, on numbers and
tensors; its names are plain names, its sizes sums and products of the batch size. A new archive is then written of
what was checked, so that PyTorch cannot see in the file what this module did not.

What is left to a hostile file: to answer wrongly, and to ask for more memory or time than there is.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from cifarx_serve.backends.base import require_file
from cifarx_serve.errors import ModelFileError
from cifarx_serve.spec import ModelSpec

_Found = TypeVar("_Found")

SPEC_FILE: Final = "cifarx_spec.json"
"""The name of the model spec among the archive's extra files."""

SAMPLE_INPUTS: Final = "data/sample_inputs/model.pt"
"""Always there, and empty in our files: PyTorch would unpickle it."""

_PROGRAM: Final = "models/model.json"
_DOCUMENTS: Final = (_PROGRAM, "data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_LARGEST_DOCUMENT: Final = 64 * 2**20  # the graph of torchvision's largest classifier takes 3 MB

_MEMBER: Final = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/version|\.data/serialization_id|"
    + "|".join(map(re.escape, (*_DOCUMENTS, SAMPLE_INPUTS, f"extra/{SPEC_FILE}")))
)

# Of torchvision's classifiers and our own, in float32 and float16.
_ATEN: Final = """
_assert_tensor_metadata.default adaptive_avg_pool2d.default add.Tensor add_.Tensor amax.default avg_pool2d.default
batch_norm.default cat.default chunk.default clamp.default clamp_min.default clone.default contiguous.default
conv2d.default conv2d.padding div.Tensor div_.Tensor dropout.default dropout_.default einsum.default eq.Scalar
exp.default expand.default expand_as.default fill_.Scalar flatten.using_ints gelu.default group_norm.default
hardsigmoid.default hardsigmoid_.default hardswish.default hardswish_.default hardtanh.default hardtanh_.default
index.Tensor layer_norm.default linalg_vector_norm.default linear.default masked_fill.Scalar matmul.default
max_pool2d.default mean.dim mul.Scalar mul.Tensor mul_.Tensor ne.Scalar neg.default new_zeros.default pad.default
permute.default relu.default relu6.default relu6_.default relu_.default reshape.default roll.default
scaled_dot_product_attention.default select.int sigmoid.default sigmoid_.default silu.default silu_.default
slice.Tensor softmax.int split.Tensor sqrt.default squeeze.dim stack.default sub.Tensor sub_.Tensor sum.dim_IntList
swapaxes.default sym_size.int tanh.default to.dtype transpose.int unbind.int unflatten.int unsqueeze.default
view.default zero_.default zeros.default
"""
_TARGETS: Final = frozenset(
    {f"torch.ops.aten.{name}" for name in _ATEN.split()} | {"_operator.mul", "_operator.getitem"}
)

_ARGUMENTS: Final = """
as_bool as_bools as_device as_expr as_float as_floats as_int as_ints as_layout as_memory_format as_name as_none
as_optional_tensor as_optional_tensors as_scalar_type as_string as_sym_int as_sym_ints as_tensor as_tensors
"""
_KINDS: Final = frozenset(_ARGUMENTS.split())
_EMPTY: Final = frozenset({"metadata", "guards_code", "treespec_namedtuple_fields", "custom_obj_values"})

_KEY: Final = "a key"
_NAME: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_STATE_NAME: Final = re.compile(r"(\w[\w-]*(\.\w[\w-]*)*)?", re.ASCII)  # `0.weight`, and RegNet's `block1-0`
_HIDDEN: Final = re.compile(r"(^|\.)__")
_STATE_KEYS: Final = frozenset({_KEY, "parameter_name", "buffer_name", "tensor_constant_name", "fqn"})
_TEXTS: Final = {
    "as_float": re.compile(r"-?Infinity|NaN"),
    "as_string": re.compile(r"[\w ,.>-]*", re.ASCII),  # of einsum, padding modes and the like
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


class _Refused(Exception):
    """Says what of a file is not let through."""


def checked_archive(path: Path) -> io.BytesIO:
    """An archive for `torch.export.load`, written anew of the members of `path` after each was checked.

    Raises:
        ModelFileError: it is damaged, not an exported program, or holds what could run code.
    """
    members = _reading(path, _members)
    try:
        for name in _DOCUMENTS:
            members[name] = _checked_document(name, members[name])
    except _Refused as refusal:
        raise ModelFileError(
            f"{path} is not an exported program of ours ({refusal})", "open only what `cifarx export` made"
        ) from refusal
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        for name in list(members):
            written.writestr(f"archive/{name}", members.pop(name))
    archive.seek(0)
    return archive


def read_spec(path: Path) -> ModelSpec:
    """The spec of a file, without PyTorch.

    Raises:
        ModelFileError: the file is absent, damaged, or carries none.
        SpecError: the spec is malformed.
    """
    document = _reading(path, _spec_document)
    if document is None:
        raise ModelFileError(f"{path} carries no model spec", "make it with `cifarx export`")
    return ModelSpec.from_json(document, str(path))


def _spec_document(archive: zipfile.ZipFile, size: int) -> bytes | None:
    entries = _entries(archive, size)
    entry = entries.get(f"extra/{SPEC_FILE}")
    return archive.read(entry) if entry else None


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, bytes]:
    entries = _entries(archive, size)
    for name in (*_DOCUMENTS, SAMPLE_INPUTS):
        if name not in entries:
            raise _Refused(f"it has no {name}")
    for name, entry in entries.items():
        if not _MEMBER.fullmatch(name):
            raise _Refused(f"it has a member {name!r}")
        if name in _DOCUMENTS and entry.file_size > _LARGEST_DOCUMENT:
            raise _Refused(f"{name} has {entry.file_size} bytes")
    if entries[SAMPLE_INPUTS].file_size:
        raise _Refused("it has example inputs, which PyTorch would unpickle")
    return {name: archive.read(entry) for name, entry in entries.items()}


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by their names within the one folder that all of them lie in."""
    listed = archive.infolist()
    entries = {entry.filename.partition("/")[2]: entry for entry in listed}
    if len(entries) != len(listed) or len({entry.filename.partition("/")[0] for entry in listed}) > 1:
        raise _Refused("its members do not lie in one folder, each once")
    # PyTorch stores and never compresses: so what is declared must be there, once.
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in listed):
        raise _Refused("it is compressed or encrypted")
    if sum(entry.file_size for entry in listed) > size:
        raise _Refused("it declares more bytes than it has")
    return entries


def _reading(path: Path, read: Callable[[zipfile.ZipFile, int], _Found]) -> _Found:
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return read(archive, path.stat().st_size)
    except _Refused as refusal:
        raise ModelFileError(
            f"{path} is not an exported program of ours ({refusal})", "open only what `cifarx export` made"
        ) from refusal
    except Exception as error:  # what zipfile raises on damaged archives has no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelFileError(f"{path} is not an exported program ({reason})", "export it again") from error


def _checked_document(name: str, content: bytes) -> bytes:
    """The JSON document, parsed, checked and written again."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"{name} is not JSON") from error
    for key, value in _strings_and_flags(document):
        _check(key, value)
    return json.dumps(document).encode()


def _strings_and_flags(document: Any) -> Iterator[tuple[str, Any]]:
    """Every key with what it holds, and every string with the key that it is under, itself or in a list."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            yield from ((name, inner) for name, inner in value.items() if not isinstance(inner, str))
            yield from ((_KEY, name) for name in value)
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((key, inner) for inner in value)
        elif isinstance(value, str):
            yield key, value


def _check(key: str, value: Any) -> None:
    """Refuse a string, or what a key holds."""
    if key in _EMPTY and value:
        raise _Refused(f"its {key} is not empty")
    if key == "use_pickle" and value is not False:
        raise _Refused("it has pickled tensors")
    if key.startswith("as_") and key not in _KINDS:
        raise _Refused(f"it has an argument {key!r}")
    if isinstance(value, str) and not _is_allowed(key, value):
        raise _Refused(f"{key} is {value[:60]!r}")


def _is_allowed(key: str, text: str) -> bool:
    if key == "target":
        return text in _TARGETS
    if key == "expr_str":
        return _is_size(text)
    if key in _TREES:
        return _is_tree(text, _TREES[key])
    if key in _TEXTS:
        return _TEXTS[key].fullmatch(text) is not None
    name = _STATE_NAME if key in _STATE_KEYS else _NAME
    return name.fullmatch(text) is not None and not _HIDDEN.search(text)


def _is_tree(text: str, expected: Any) -> bool:
    try:
        return bool(json.loads(text) == expected)
    except (ValueError, RecursionError):
        return False


def _is_size(text: str) -> bool:
    """Whether it is SymPy's own spelling of sums and products of whole numbers and symbols. Evaluates nothing."""
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
        case "Add" | "Mul" | "Min" | "Max":
            return not node.keywords and all(map(_is_size_node, node.args))
    return False


def _is_symbol(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"s\d{1,4}", value, re.ASCII) is not None
