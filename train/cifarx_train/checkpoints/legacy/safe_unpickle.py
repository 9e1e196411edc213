"""Load any `.pth` file, including whole pickled models, without running any code in it.

PyTorch's restricted unpickler (`weights_only=True`) loads the file. Where the file names the classes of a network, the
unpickler creates stubs, which only store the state of the objects. Data from the file therefore never reaches a method
of a real class. A file that names anything that is not on the allow-list is rejected before it is loaded.
"""

import io
import re
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, Final, Self

import torch

from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.files.checksum import ChecksumState, read_checksum
from cifarx_serve.files.zip_safety import archive_problem
from cifarx_train.checkpoints.legacy.pickle_scan import PickleGlobals, scan_pickle

REMEDY: Final = "use a .pth file that `cifarx train` wrote, or one that contains a state_dict()"

LZH_CLASSES: Final = ("model.Lzh", "__main__.Lzh", "cifarx_train.models.lzh.Lzh")
"""The names of the Lzh class in the scripts of the training notes and in cifarx."""

_ALLOWED_CLASSES: Final = re.compile(
    r"(torch\.nn\.(modules|parallel)|torchvision\.(models|ops)|cifarx_train\.models)(\.[a-z_0-9]+)*\._?[A-Z]\w*"
)
# Plain values that files contain next to the weights, or that torchvision's networks have as attributes. They are also
# replaced by stubs.
_ALLOWED_VALUES: Final = frozenset(
    {"functools.partial", "argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.dtype"}
    | {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
)
_CLASS_OF: Final = "cifarx.class_of"

_lock = threading.Lock()  # PyTorch's allow-list is global


class ObjectStub:
    """Takes the place of an object in a file. It stores the state of the object and does nothing.

    It has slots and therefore no `__dict__` in which the file could place attributes or methods.

    Attributes:
        name: the fully qualified name of the object's class.
        state: the pickled state of the object, or None.
    """

    __slots__ = ("state",)
    name: ClassVar[str] = ""
    state: Any

    def __new__(cls, *_: Any) -> Self:
        self = super().__new__(cls)
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


def as_plain_dict(value: Any) -> dict[Any, Any] | None:
    """Return a copy of a dict from a file, or None for any other type.

    The methods of an OrderedDict must not be called, because the file can replace them.
    """
    return dict(dict.items(value)) if type(value) in (dict, OrderedDict) else None


def safe_load(path: Path, allow_any_class: bool = False) -> Any:
    """Load a file that `torch.save` wrote, on the CPU, with an `ObjectStub` for anything but plain types and tensors.

    Args:
        path: a file in PyTorch's zip format, or in its format before 1.6.
        allow_any_class: whether networks can have unknown classes, such as those of the user.

    Raises:
        ModelFileError: the file is damaged, or names a class or function that is not on the allow-list.
    """
    # Damaged bytes make the readers raise almost any exception.
    try:
        _check_archive(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        return _load(path, {})
    except Exception as error:
        failure = error
    try:
        found, source = _scan(path)
        unsafe = _unsafe_globals(found.imported)
    except Exception as error:  # it is not a pickle; the first exception is more informative
        raise _unreadable(path, failure) from error
    _check_allowed(path, unsafe, found, allow_any_class)
    allowed: dict[str, Any] = {name: type("Stub", (ObjectStub,), {"__slots__": (), "name": name}) for name in unsafe}
    if found.class_ids:
        allowed[_CLASS_OF] = _class_of
    try:
        return _load(source, allowed)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelFileError:
    reason = error_message(error).split(". ")[0]
    return ModelFileError(f"{path} is not a readable checkpoint ({reason})", REMEDY)


def _is_zip(path: Path) -> bool:
    """Return whether a file has the zip format, by the same test as PyTorch."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """Raise an exception for a damaged archive. PyTorch does not check the checksums of the weights."""
    if not _is_zip(path):
        return
    if problem := archive_problem(path):
        raise zipfile.BadZipFile(problem)
    if read_checksum(path).state is ChecksumState.CHANGED:
        raise zipfile.BadZipFile("its checksum does not match, so it was changed after it was written")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise zipfile.BadZipFile("a TorchScript archive")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged")


def _load(source: Path | IO[bytes], allowed: dict[str, Any]) -> Any:
    with _allow_only(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about an unusual pickle protocol
        return torch.load(source, map_location="cpu", weights_only=True)


@contextmanager
def _allow_only(allowed: dict[str, Any]) -> Iterator[None]:
    """Replace PyTorch's allow-list, because globals that other code has allowed would create real objects."""
    ours = {(value, name) for name, value in allowed.items()}
    with _lock:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(ours))
        try:
            yield
        finally:
            # Keep what another thread has added meanwhile, as some modules of PyTorch do when they are imported.
            added = set(torch.serialization.get_safe_globals()) - ours
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([*before, *added])


def _class_of(persistent_id: Any) -> Any:
    """Return the class in `("module", class, file, source)`."""
    _, loaded, _, _ = persistent_id
    return loaded


# --- globals of a file


def _scan(path: Path) -> tuple[PickleGlobals, Path | IO[bytes]]:
    """Return the globals of a file, and the source to load: a rewritten copy if PyTorch cannot load the file itself."""
    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            (pickle,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if pickle.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("its pickle is compressed")
            return scan_pickle(io.BytesIO(archive.read(pickle))), path
    with path.open("rb") as file:
        # The format before PyTorch 1.6 has five pickles, the magic number, protocol version, system information, object
        # and keys, followed by the weights.
        parts = [scan_pickle(file) for _ in range(5)]
        imported = frozenset().union(*(part.imported for part in parts))
        called = frozenset().union(*(part.called for part in parts))
        class_ids = parts[3].class_ids
        return PickleGlobals(imported, called, class_ids), _replace_class_ids(file, class_ids) if class_ids else path


def _replace_class_ids(file: IO[bytes], class_ids: Iterable[tuple[int, int]]) -> IO[bytes]:
    """Return a copy of the file that PyTorch's restricted unpickler can load.

    Before 1.6, PyTorch wrote a class as a persistent id that also contains its source code. The restricted unpickler
    supports persistent ids only for storages. So each `id BINPERSID` is replaced by the call `class_of(id)`, and the
    allow-list maps `class_of` to a function that returns the class.
    """
    module, _, name = _CLASS_OF.rpartition(".")
    edits = [(begin, 0, f"c{module}\n{name}\n".encode()) for begin, _ in class_ids]  # GLOBAL
    edits += [(end, 1, b"\x85R") for _, end in class_ids]  # TUPLE1 REDUCE instead of BINPERSID
    copy = io.BytesIO()
    file.seek(0)
    for position, skipped, inserted in sorted(edits):
        copy.write(file.read(position - file.tell()))
        copy.write(inserted)
        file.seek(skipped, io.SEEK_CUR)
    copy.write(file.read())
    copy.seek(0)
    return copy


def _unsafe_globals(names: frozenset[str]) -> list[str]:
    """Return the names that PyTorch's restricted unpickler does not allow by default, sorted."""
    malformed = {name for name in names if not re.fullmatch(r"\w+(\.\w+)+", name)}
    lines = ["c{}\n{}\n".format(*name.rsplit(".", 1)) for name in sorted(names - malformed)]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("names/data.pkl", b"\x80\x02" + "".join(lines).encode() + b".")
        writer.writestr("names/version", "3\n")
    archive.seek(0)
    with _allow_only({}):
        return sorted(malformed | set(torch.serialization.get_unsafe_globals_in_checkpoint(archive)))


def _check_allowed(path: Path, unsafe: list[str], found: PickleGlobals, allow_any_class: bool) -> None:
    """Raise a ModelFileError if the file names anything that is not on the allow-list."""
    refused = [name for name in unsafe if not _is_allowed(name, found, allow_any_class)]
    if code := [name for name in refused if name in found.called or not _may_be_user_class(name)]:
        raise ModelFileError(
            f"{path} would run code ({_format_names(code)})",
            "it was not loaded; use a file that contains only a state_dict()",
        )
    if refused:
        raise ModelFileError(
            f"{path} needs the class {_format_names(refused)}, which does not belong to torch.nn or torchvision",
            "save its state_dict() instead, or name the architecture with --model",
        )


def _is_allowed(name: str, found: PickleGlobals, allow_any_class: bool) -> bool:
    if name in _ALLOWED_VALUES:
        return True
    if name in found.called:  # the objects of a network are created without a call
        return False
    return (
        name in LZH_CLASSES
        or _ALLOWED_CLASSES.fullmatch(name) is not None
        or (allow_any_class and _may_be_user_class(name))
    )


def _may_be_user_class(name: str) -> bool:
    """Return whether a name can be that of a user's class, which is not part of Python, PyTorch or NumPy."""
    root, dot, _ = name.partition(".")
    return bool(dot) and (root == "__main__" or root not in sys.stdlib_module_names | {"torch", "torchvision", "numpy"})


def _format_names(names: list[str]) -> str:
    """Return at most three names as text, with the public names of functions: a file contains `posix.system`."""
    public = [re.sub(r"[^\w. ]", "?", re.sub(r"^(posix|nt)\.", "os.", name))[:100] for name in names[:3]]
    return ", ".join(public) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
