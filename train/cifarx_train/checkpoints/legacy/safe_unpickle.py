"""Any `.pth` file in memory without running a byte of it, whole pickled networks too.

PyTorch's own restricted reader does the loading. Where a file names a network's classes, the reader is given empty
stand-ins of ours under those names: they take the file's tensors and do nothing, so no method of a real class meets
what the file says. A file that names anything else is refused before it is loaded.
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

from cifarx_serve.errors import ModelFileError
from cifarx_serve.files.checksum import SealState, read_seal
from cifarx_serve.files.zip_safety import archive_problem
from cifarx_train.checkpoints.legacy.pickle_scan import Asked, scan_pickle

REMEDY: Final = "give a .pth file that `cifarx train` wrote, or one with a network's state_dict()"

LZH_CLASSES: Final = ("model.Lzh", "__main__.Lzh", "cifarx_train.models.lzh.Lzh")
"""The notes' network, under the names that scripts gave it, and ours."""

_CLASSES: Final = re.compile(
    r"(torch\.nn\.(modules|parallel)|torchvision\.(models|ops)|cifarx_train\.models)(\.[a-z_0-9]+)*\._?[A-Z]\w*"
)
# Plain values that lie beside weights, or in the attributes of torchvision's networks; they too become stand-ins.
_VALUES: Final = frozenset(
    {"functools.partial", "argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.dtype"}
    | {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
)
_CLASS_OF: Final = "cifarx.class_of"

_lock = threading.Lock()  # the reader's allow-list is one for the process


class StandIn:
    """In place of an object of a file: keeps its state and does nothing.

    It has slots and so no dict that the file could put attributes or methods into.
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


def plain_dict(value: Any) -> dict[Any, Any] | None:
    """A dict of a file as a new one, or None for anything else; an OrderedDict may have got methods from the file."""
    return dict(dict.items(value)) if type(value) in (dict, OrderedDict) else None


def load_safely(path: Path, any_class: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU: plain types, tensors, and `StandIn`s for the objects of networks.

    Args:
        path: a file in PyTorch's zip format or in the older one.
        any_class: whether networks may be of classes that nobody here knows.

    Raises:
        ModelFileError: damaged, or it names a class or function that is not on the list.
    """
    # Every reader here lets damaged bytes raise almost anything.
    try:
        _check_archive(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        return _load(path, {})
    except Exception as error:
        failure = error
    try:
        asked, source = _scan(path)
        foreign = _foreign(asked.named)
    except Exception as error:  # no pickle at all: the first failure tells more
        raise _unreadable(path, failure) from error
    _refuse(path, foreign, asked, any_class)
    allowed: dict[str, Any] = {name: type("Named", (StandIn,), {"__slots__": (), "name": name}) for name in foreign}
    if asked.wrapped:
        allowed[_CLASS_OF] = _class_of
    try:
        return _load(source, allowed)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelFileError:
    reason = str(error).strip().split("\n")[0].split(". ")[0]
    return ModelFileError(f"{path} is not a checkpoint that can be read ({reason})", REMEDY)


def _is_zip(path: Path) -> bool:
    """As PyTorch tells its two formats apart."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """PyTorch reads the weights without a look at their checksums."""
    if not _is_zip(path):
        return
    if problem := archive_problem(path):
        raise zipfile.BadZipFile(problem)
    if read_seal(path).state is SealState.CHANGED:
        raise zipfile.BadZipFile("a byte of it was changed after it was written")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise zipfile.BadZipFile("a TorchScript archive")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged")


def _load(source: Path | IO[bytes], allowed: dict[str, Any]) -> Any:
    with _allow_only(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a pickle protocol that is unusual
        return torch.load(source, map_location="cpu", weights_only=True)


@contextmanager
def _allow_only(allowed: dict[str, Any]) -> Iterator[None]:
    """What the process allows elsewhere is no part of this: the file must meet stand-ins, not real classes."""
    ours = {(value, name) for name, value in allowed.items()}
    with _lock:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(ours))
        try:
            yield
        finally:
            # What another thread has allowed meanwhile, as some modules of PyTorch do when imported, stays.
            added = set(torch.serialization.get_safe_globals()) - ours
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([*before, *added])


def _class_of(persistent_id: Any) -> Any:
    """The class in `("module", class, file, source)`."""
    _, kind, _, _ = persistent_id
    return kind


# --- what a file asks for


def _scan(path: Path) -> tuple[Asked, Path | IO[bytes]]:
    """What the file asks for, and where to load it from: a copy where PyTorch's restricted reader cannot read it."""
    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            (pickle,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if pickle.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("its pickle is compressed")
            return scan_pickle(io.BytesIO(archive.read(pickle))), path
    with path.open("rb") as file:
        # A file of PyTorch before 1.6: magic number, version, machine, the object, keys; then the weights.
        parts = [scan_pickle(file) for _ in range(5)]
        named = frozenset().union(*(part.named for part in parts))
        called = frozenset().union(*(part.called for part in parts))
        wrapped = parts[3].wrapped
        return Asked(named, called, wrapped), _unwrapped(file, wrapped) if wrapped else path


def _unwrapped(file: IO[bytes], wrapped: Iterable[tuple[int, int]]) -> IO[bytes]:
    """The file with its classes written plainly.

    Before 1.6, PyTorch wrote a class as a persistent id, with its source beside it. The restricted reader takes only
    storages there. So each `id BINPERSID` becomes the call `class_of(id)`, of a function of ours that picks the class.
    """
    module, _, name = _CLASS_OF.rpartition(".")
    edits = [(begin, 0, f"c{module}\n{name}\n".encode()) for begin, _ in wrapped]  # GLOBAL
    edits += [(end, 1, b"\x85R") for _, end in wrapped]  # TUPLE1 REDUCE in place of BINPERSID
    copy = io.BytesIO()
    file.seek(0)
    for position, skipped, inserted in sorted(edits):
        copy.write(file.read(position - file.tell()))
        copy.write(inserted)
        file.seek(skipped, io.SEEK_CUR)
    copy.write(file.read())
    copy.seek(0)
    return copy


def _foreign(names: frozenset[str]) -> list[str]:
    """Those of the names that PyTorch's restricted reader does not take by itself."""
    odd = {name for name in names if not re.fullmatch(r"\w+(\.\w+)+", name)}
    lines = ["c{}\n{}\n".format(*name.rsplit(".", 1)) for name in sorted(names - odd)]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("names/data.pkl", b"\x80\x02" + "".join(lines).encode() + b".")
        writer.writestr("names/version", "3\n")
    archive.seek(0)
    with _allow_only({}):
        return sorted(odd | set(torch.serialization.get_unsafe_globals_in_checkpoint(archive)))


def _refuse(path: Path, foreign: list[str], asked: Asked, any_class: bool) -> None:
    """Raises ModelFileError where the file names what no network needs."""
    refused = [name for name in foreign if not _is_allowed(name, asked, any_class)]
    if code := [name for name in refused if name in asked.called or not _is_users(name)]:
        raise ModelFileError(f"{path} would run code ({_told(code)})", "it is not loaded; give one with a state_dict()")
    if refused:
        raise ModelFileError(
            f"{path} needs the class {_told(refused)}, which is not one of torch.nn, torchvision or the notes' Lzh",
            "save its state_dict() instead, or give --model",
        )


def _is_allowed(name: str, asked: Asked, any_class: bool) -> bool:
    if name in _VALUES:
        return True
    if name in asked.called:  # a network's classes are made without a call
        return False
    return name in LZH_CLASSES or _CLASSES.fullmatch(name) is not None or (any_class and _is_users(name))


def _is_users(name: str) -> bool:
    """Whether it may be a class that a user wrote: not of Python, not of PyTorch."""
    root, dot, _ = name.partition(".")
    return bool(dot) and (root == "__main__" or root not in sys.stdlib_module_names | {"torch", "torchvision", "numpy"})


def _told(names: list[str]) -> str:
    """At most three, by the names that people know: `os.system` is `posix.system` in a file."""
    known = [re.sub(r"[^\w. ]", "?", re.sub(r"^(posix|nt)\.", "os.", name))[:100] for name in names[:3]]
    return ", ".join(known) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
