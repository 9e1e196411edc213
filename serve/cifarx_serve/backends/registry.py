"""Backends by name and by file: this room's own, and any that an installed package offers.

A package offers one through the entry-point group `cifarx.backends`: the entry's name is the backend's, its
value the `Backend` subclass, as in `tvm = "my_package.tvm_backend:TvmBackend"`.
"""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple

from cifarx_serve.backends.base import Backend, require_file
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import ModelFileError, UsageError, unknown
from cifarx_serve.spec import ModelSpec

GROUP: Final = "cifarx.backends"


class _Target(NamedTuple):
    """Where a backend is, and the suffixes of its files where they are known without importing it."""

    path: str
    suffixes: tuple[str, ...] | None = None


# Known without reading every installed package's metadata (30 ms), without an install, and without an import.
_targets: dict[str, _Target] = {
    "onnxruntime": _Target("cifarx_serve.backends.onnxruntime.backend:OnnxRuntimeBackend", (".onnx",)),
    "torchscript": _Target("cifarx_serve.backends.torch.torchscript:TorchScriptBackend", (".torchscript.pt",)),
    "exported_program": _Target("cifarx_serve.backends.torch.exported_program:ExportedProgramBackend", (".pt2",)),
    "aot_inductor": _Target("cifarx_serve.backends.torch.aot_inductor:AotInductorBackend", (".aoti.pt2",)),
}


class RegisteredBackend(NamedTuple):
    """What `register_backend` takes."""

    name: str
    target: str
    suffixes: tuple[str, ...] | None


def registered_backends() -> tuple[RegisteredBackend, ...]:
    """Of this process, in the order they were added: another process can have the same."""
    return tuple(RegisteredBackend(name, target.path, target.suffixes) for name, target in _targets.items())


def register_backend(name: str, target: str, suffixes: tuple[str, ...] | None = None) -> None:
    """Add a backend for this process; `target` is `module:Class`, imported when it is first asked for.

    With `suffixes`, those of the class, it is not imported for other backends' files.
    """
    _targets[name] = _Target(target, suffixes)


def backend_names() -> list[str]:
    """Every backend that can be asked for, sorted."""
    return sorted(_targets.keys() | _entry_points().keys())


def backend_class(name: str) -> type[Backend]:
    """The backend of that name.

    Raises:
        UsageError: there is none.
    """
    if own := _targets.get(name):
        return _load(name, own.path)
    if target := _entry_points().get(name):
        return _load(name, target)
    raise unknown("backend", name, backend_names())


def backend_for(path: Path) -> type[Backend]:
    """The backend that opens a file of this name, by its suffix; the longest suffix of this process's own wins.

    Raises:
        UsageError: none does.
    """
    # This process's own first: other packages' cost the reading of every installed package's metadata.
    for names in (_targets.keys, backend_names):
        if fitting := [pair for pair in _suffixes(names()) if path.name.endswith(pair[0])]:
            return backend_class(max(fitting, key=lambda pair: len(pair[0]))[1])
    known = ", ".join(sorted({suffix for suffix, _ in _suffixes(backend_names())}))
    raise UsageError(f"no backend opens {path}", f"give a file that ends in {known}")


def _suffixes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each suffix with its backend's name."""
    return [(suffix, name) for name in names for suffix in _suffixes_of(name)]


def _suffixes_of(name: str) -> tuple[str, ...]:
    own = _targets.get(name)
    return own.suffixes if own and own.suffixes else backend_class(name).suffixes


def _opens(backend: type[Backend], path: Path) -> bool:
    """Whether the file's name is of this backend's kind, and not more closely of another's: x.aoti.pt2 is no x.pt2."""
    longest = max((len(suffix) for suffix, _ in _suffixes(_targets) if path.name.endswith(suffix)), default=0)
    return any(path.name.endswith(suffix) and len(suffix) >= longest for suffix in backend.suffixes)


def read_spec(path: str | Path) -> ModelSpec:
    """What a checkpoint or artifact says about itself.

    Raises:
        UsageError: no backend knows its suffix.
        ModelFileError, SpecError: it is absent, damaged or says nothing.
    """
    path = model_file(Path(path))
    require_file(path)
    return backend_for(path).read_spec(path)


def open_backend(path: str | Path, backend: str | None = None, device: str = "auto") -> Backend:
    """Open a model file on a device, with the backend named or the one that its suffix asks for.

    Raises:
        UsageError: no such backend or device, or a file of another backend's kind.
        ModelFileError: the file is absent or not what its name says.
        DeviceError: the device cannot be had.
    """
    path, parsed = model_file(Path(path)), parse_device(device)
    kind = backend_class(backend) if backend else None
    require_file(path)
    if kind is None:
        kind = backend_for(path)
    elif not _opens(kind, path):
        raise UsageError(
            f"backend {kind.name} does not open {path}", f"give a file that ends in {', '.join(kind.suffixes)}"
        )
    return kind(path, parsed)


def model_file(path: Path) -> Path:
    """The model in a folder that is a model repository of NVIDIA Triton with one model; else the path itself."""
    models = list(path.glob("*/1/model.onnx")) if path.is_dir() else []
    return models[0] if len(models) == 1 else path


def find_model(folder: Path, backend: str) -> Path:
    """The newest file in a folder that the backend can open.

    Raises:
        ModelFileError: there is none.
    """
    kind = backend_class(backend)
    fitting = [path for path in folder.iterdir() if path.name[0] != "." and _opens(kind, path) and path.is_file()]
    if not fitting:
        raise ModelFileError(
            f"no file for backend {backend} (*{', *'.join(kind.suffixes)}) in {folder.resolve()}",
            "name one with --model, or make one with `cifarx train` and `cifarx export`",
        )
    return max(fitting, key=lambda path: (path.stat().st_mtime_ns, path.name))


@cache
def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points  # costs 30 ms, and most runs need none of it

    return {entry.name: entry.value for entry in entry_points(group=GROUP)}


def _load(name: str, target: str) -> type[Backend]:
    module, _, attribute = target.partition(":")
    try:
        backend = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"backend {name} ({target}) cannot be loaded ({error})", "repair its package") from error
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise UsageError(f"backend {name} ({target}) is not a Backend", "repair its package")
    return backend
