"""Read a file of `torch.save` without running any code in it: its weights, and a stub for anything that is not plain.

Both formats contain one pickle, in which every tensor refers to its storage by a key. PyTorch 1.6 and later write a zip
archive with a member per storage. Earlier versions wrote several pickles, followed by the storages.
"""

import io
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import IO, Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.files.checksum import ChecksumState, read_checksum
from cifarx_serve.files.file_format import FileFormat, detect_format
from cifarx_serve.files.zip_safety import archive_problem
from cifarx_train.checkpoints.external.pickle_machine import (
    Constructor,
    Evaluation,
    Global,
    ObjectStub,
    evaluate_pickle,
    require_key,
)
from cifarx_train.checkpoints.external.pickle_policy import format_names, refused_names

REMEDY: Final = "use a checkpoint of `cifarx train`, or a file that contains a state_dict() or a whole model"

_STORAGE: Final = re.compile(r"torch\.(?:\w+\.)*?_?(\w+)Storage")
# The names of the storage classes in PyTorch's files, and the type in which their bytes are read.
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
}
_MAGIC_NUMBER: Final = 0x1950A86A20F9469CFC6C
"""The first pickle of a file before PyTorch 1.6. The protocol version and a description of the machine follow."""


def load_torch_file(path: Path) -> Any:
    """Return the content of a file, on the CPU: plain types, tensors, and `Global` or `ObjectStub` for anything else.

    Parameters become plain tensors. Sparse, quantized and other special tensors become stubs.

    Raises:
        ModelFileError: the file is damaged, or would run code in another reader.
    """
    if detect_format(path) is FileFormat.TORCHSCRIPT:
        raise ModelFileError(
            f"{path} is a TorchScript archive, not a checkpoint", "give the checkpoint that it was made from"
        )
    # Damaged bytes make the readers raise almost any exception.
    try:
        evaluation = _read_zip(path) if _is_zip(path) else _read_pickles(path)
    except Exception as error:
        reason = error_message(error).split(". ")[0]
        raise ModelFileError(f"{path} is not a readable checkpoint ({reason})", REMEDY) from error
    if refused := refused_names(evaluation):
        raise ModelFileError(
            f"{path} would run code ({format_names(refused)})",
            "it was not loaded; use a file that contains only a state_dict()",
        )
    return evaluation.value


def _is_zip(path: Path) -> bool:
    """Return whether a file has the zip format, by the same test as PyTorch."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


class _Storage(NamedTuple):
    """A storage: its bytes, and the type of its elements."""

    data: torch.UntypedStorage
    dtype: torch.dtype


# --- the format since PyTorch 1.6 format


def _read_zip(path: Path) -> Evaluation:
    if problem := archive_problem(path):
        raise zipfile.BadZipFile(problem)
    if read_checksum(path).state is ChecksumState.CHANGED:
        raise zipfile.BadZipFile("its checksum does not match, so it was changed after it was written")
    with zipfile.ZipFile(path) as archive:
        (pickle,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if pickle.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile("its pickle is compressed")
        folder = pickle.filename.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
            raise zipfile.BadZipFile("its numbers have the byte order of another kind of machine")
        storages: dict[str, torch.UntypedStorage] = {}

        def load_storage(key: str, count: int, item_size: int) -> torch.UntypedStorage:
            name = f"{folder}data/{key}"
            if name not in storages:
                entry = archive.getinfo(name)
                if entry.file_size < count * item_size:
                    raise ValueError(f"storage {key} is too short")
                with archive.open(entry) as member:
                    storages[name] = _read_storage(member, entry.file_size)
            return storages[name]

        evaluation = evaluate_pickle(io.BytesIO(archive.read(pickle)), CONSTRUCTORS, _persistent_loader(load_storage))
        for name in archive.namelist():
            if name not in storages:
                archive.read(name)  # raises an exception if its checksum does not match
        return evaluation


def _read_storage(file: IO[bytes], size: int) -> torch.UntypedStorage:
    content = torch.empty(size, dtype=torch.uint8)
    array: NDArray[np.uint8] = content.numpy()
    if size and file.readinto(array.data) != size:  # type: ignore[attr-defined]  # not in the protocol IO
        raise EOFError("the file is truncated")
    return content.untyped_storage()


# --- the format before PyTorch 1.6


def _read_pickles(path: Path) -> Evaluation:
    storages: dict[str, torch.UntypedStorage] = {}
    counts: dict[str, int] = {}
    left = path.stat().st_size

    def load_storage(key: str, count: int, item_size: int) -> torch.UntypedStorage:
        nonlocal left
        if key not in storages:
            left -= count * item_size
            if left < 0:
                raise ValueError("its weights are larger than the file")
            storages[key] = torch.empty(count * item_size, dtype=torch.uint8).untyped_storage()
            counts[key] = count
        return storages[key]

    with path.open("rb") as file:
        loader = _persistent_loader(load_storage)
        magic, version, machine = (evaluate_pickle(file, {}, loader) for _ in range(3))
        if magic.value != _MAGIC_NUMBER:
            raise ValueError("not a file of torch.save")
        if type(machine.value) is not dict or machine.value.get("little_endian") is not (sys.byteorder == "little"):
            raise ValueError("its numbers have the byte order of another kind of machine")
        content = evaluate_pickle(file, CONSTRUCTORS, loader)
        keys = evaluate_pickle(file, {}, loader)
        # The storages come last. They are read into the memory that the tensors already use.
        for key in keys.value:
            if int.from_bytes(file.read(8), "little") != counts.get(key):
                raise ValueError(f"storage {key!r} has another size than its tensors")
            storages[key].copy_(_read_storage(file, storages[key].nbytes()))
    parts = [magic, version, machine, content, keys]
    imported = frozenset().union(*(part.imported for part in parts))
    called = frozenset().union(*(part.called for part in parts))
    return Evaluation(content.value, imported, called)


# --- tensors


def _persistent_loader(load_storage: Callable[[str, int, int], torch.UntypedStorage]) -> Callable[[Any], Any]:
    """Return a function that loads the storage of a persistent id: `load_storage(key, count, item_size)`.

    Before 1.6, PyTorch also wrote a class as a persistent id, `("module", class, file, source)`.
    """

    def load(persistent_id: Any) -> Any:
        match persistent_id:
            case ("storage", Global(name=name), str() as key, _, int() as count, *view) if view in ([], [None]):
                kind = _STORAGE.fullmatch(name)
                dtype = _DTYPES.get(kind[1]) if kind else None
                if dtype is None or count < 0:
                    raise ValueError(f"a storage of {count} elements of {name}")
                return _Storage(load_storage(key, count, dtype.itemsize), dtype)
            case ("module", Global() as loaded, *_):
                return loaded
        raise ValueError("an unknown persistent id")

    return load


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None) -> Any:
    """Return a tensor that is a view of a storage.

    The rest are `requires_grad` and hooks, which do not matter here, and metadata of a lazily conjugated or negated
    tensor, which becomes a stub.
    """
    if any(rest[2:]):
        return ObjectStub("torch._utils._rebuild_tensor_v2", called=True)
    data, stored = storage
    tensor = torch.empty(0, dtype=dtype or stored)
    numbers = [int(number) for number in (offset, *size, *stride)]
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # PyTorch would enlarge the storage.
    if min(numbers) < 0 or (0 not in size and (last + 1) * tensor.itemsize > data.nbytes()):
        raise ValueError("a tensor that is larger than its storage")
    return tensor.set_(data, offset, tuple(size), tuple(stride))


def _rebuild_tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Return a tensor whose type the storage does not have: the arguments before the metadata contain its dtype."""
    requires_grad, hooks, dtype, *metadata = rest
    return _rebuild_tensor(storage, offset, size, stride, requires_grad, hooks, *metadata, dtype=as_dtype(dtype))


def as_dtype(value: Any) -> torch.dtype | None:
    """Return the dtype that a file names, such as `torch.float32`, or None if it names something else."""
    owner, _, name = value.name.rpartition(".") if isinstance(value, Global) else ("", "", "")
    dtype = getattr(torch, name, None) if owner == "torch" else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """Return a tensor that has attributes, without them. A subclass of Tensor may behave differently."""
    rebuild = CONSTRUCTORS.get(function.name)
    plain = kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
    return rebuild(*arguments) if rebuild and plain else ObjectStub(kind.name)


def _size(values: Any = ()) -> torch.Size:
    return torch.Size(int(value) for value in values)


def _device(*arguments: Any) -> Any:
    try:
        return torch.device(*arguments)
    except (RuntimeError, TypeError):  # a kind of device that this version does not know
        return ObjectStub("torch.device", arguments)


def _ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    """Return an OrderedDict of pairs, which Python 2 passes as arguments. Later versions set the items one by one."""
    return OrderedDict((require_key(key), value) for key, value in items)


def _counter(counts: Any = None) -> dict[Any, Any]:
    """Return the counts of a Counter, which is pickled as a call with a dict."""
    if type(counts) not in (dict, NoneType):
        raise ValueError("a Counter that is not made from a dict")
    return dict(counts or {})


def _set(items: Any = ()) -> set[Any]:
    return {require_key(item) for item in items}


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin-1")


CONSTRUCTORS: Final[Mapping[str, Constructor]] = {
    "_codecs.encode": _encode,
    "builtins.bytearray": lambda data=b"", *_: data,
    "builtins.complex": complex,
    "builtins.frozenset": lambda items=(): frozenset(_set(items)),
    "builtins.set": _set,
    "collections.Counter": _counter,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *_: {},
    "collections.deque": lambda items=(), *_: list(items),
    "torch.Size": _size,
    "torch.device": _device,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
}
"""The functions that make plain values and tensors. They run with arbitrary arguments from a file."""
