"""Backends by name and by file: this room's own, and any that an installed package offers.

A package offers one through the entry-point group `cifarx.backends`: the entry's name is the backend's, its
value the `Backend` subclass, as in `tvm = "my_package.tvm_backend:TvmBackend"`.
"""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

from cifarx_serve.backends.base import Backend, require_file
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import ModelFileError, UsageError, unknown
from cifarx_serve.spec import ModelSpec

GROUP: Final = "cifarx.backends"

# Known without reading every installed package's metadata (30 ms), and without an install at all.
_targets: dict[str, str] = {
    "onnxruntime": "cifarx_serve.backends.onnxruntime_backend:OnnxRuntimeBackend",
    "torchscript": "cifarx_serve.backends.torchscript_backend:TorchScriptBackend",
}


def register_backend(name: str, target: str) -> None:
    """Add a backend for this process; `target` is `module:Class`, imported when it is first asked for."""
    _targets[name] = target


def backend_names() -> list[str]:
    """Every backend that can be asked for, sorted."""
    return sorted(_targets.keys() | _entry_points().keys())


def backend_class(name: str) -> type[Backend]:
    """The backend of that name.

    Raises:
        UsageError: there is none.
    """
    target = _targets.get(name) or _entry_points().get(name)
    if target is None:
        raise unknown("backend", name, backend_names())
    return _load(name, target)


def backend_for(path: Path) -> type[Backend]:
    """The backend that opens a file of this name, by its suffix; the longest suffix of this process's own wins.

    Raises:
        UsageError: none does.
    """
    # This process's own first: other packages' cost the reading of every installed package's metadata.
    for names in (_targets.keys, backend_names):
        if fitting := [(suffix, backend) for suffix, backend in _suffixes(names()) if path.name.endswith(suffix)]:
            return max(fitting, key=lambda pair: len(pair[0]))[1]
    known = ", ".join(sorted({suffix for suffix, _ in _suffixes(backend_names())}))
    raise UsageError(f"no backend opens {path}", f"give a file that ends in {known}")


def _suffixes(names: Iterable[str]) -> list[tuple[str, type[Backend]]]:
    return [(suffix, backend) for backend in map(backend_class, names) for suffix in backend.suffixes]


def read_spec(path: str | Path) -> ModelSpec:
    """What a checkpoint or artifact says about itself.

    Raises:
        UsageError: no backend knows its suffix.
        ModelFileError, SpecError: it is absent, damaged or says nothing.
    """
    path = Path(path)
    require_file(path)
    return backend_for(path).read_spec(path)


def open_backend(path: str | Path, backend: str | None = None, device: str = "auto") -> Backend:
    """Open a model file on a device, with the backend named or the one that its suffix asks for.

    Raises:
        UsageError: no such backend or device, or a file of another backend's kind.
        ModelFileError: the file is absent or not what its name says.
        DeviceError: the device cannot be had.
    """
    path, parsed = Path(path), parse_device(device)
    kind = backend_class(backend) if backend else None
    require_file(path)
    if kind is None:
        kind = backend_for(path)
    elif not path.name.endswith(kind.suffixes):
        raise UsageError(
            f"backend {kind.name} does not open {path}", f"give a file that ends in {', '.join(kind.suffixes)}"
        )
    return kind(path, parsed)


def find_model(folder: Path, backend: str) -> Path:
    """The newest file in a folder that the backend can open.

    Raises:
        ModelFileError: there is none.
    """
    suffixes = backend_class(backend).suffixes
    fitting = [
        path for path in folder.iterdir() if path.name.endswith(suffixes) and path.name[0] != "." and path.is_file()
    ]
    if not fitting:
        raise ModelFileError(
            f"no file for backend {backend} (*{', *'.join(suffixes)}) in {folder.resolve()}",
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
