"""Find backends by name or by file: those of cifarx, and those of other installed packages.

A package provides a backend through the entry-point group `cifarx.backends`. The entry's name is the name of the
backend and its value is the `Backend` subclass, as in `tvm = "my_package.tvm_backend:TvmBackend"`.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from cifarx_serve.backends.base import NOTHING_STATED, Backend, require_file
from cifarx_serve.devices import Device, parse_device
from cifarx_serve.errors import ModelFileError, UsageError, unknown_name_error
from cifarx_serve.files.checksum import require_intact
from cifarx_serve.files.file_format import FileFormat, detect_format
from cifarx_serve.spec import ModelSpec

GROUP: Final = "cifarx.backends"

WEB_MODEL: Final = "model.web.onnx"
"""The name of the model in a directory for browsers, which the backend `web` opens."""

_BACKEND_OF_FORMAT: Final = MappingProxyType(
    {
        FileFormat.ONNX: "onnxruntime",
        FileFormat.TORCHSCRIPT: "torchscript",
        FileFormat.EXPORTED_PROGRAM: "exported_program",
        FileFormat.AOT_INDUCTOR: "aot_inductor",
        FileFormat.OPENVINO: "openvino",
        FileFormat.EXECUTORCH: "executorch",
        FileFormat.LITERT: "litert",
        FileFormat.TORCH_ZIP: "pytorch",
        FileFormat.TORCH_PICKLE: "pytorch",
        FileFormat.SAFETENSORS: "pytorch",
        FileFormat.HUGGING_FACE: "pytorch",
    }
)


class RegisteredBackend(NamedTuple):
    """A backend that is registered in this process, with the arguments of `register_backend`."""

    name: str
    target: str
    suffixes: tuple[str, ...] | None


_registered: dict[str, RegisteredBackend] = {}


def register_backend(name: str, target: str, suffixes: tuple[str, ...] | None = None) -> None:
    """Register a backend in this process.

    Args:
        name: the name of the backend.
        target: the `Backend` subclass as `module:Class`. It is imported when it is first needed.
        suffixes: the suffixes of the files that the backend opens. If None, those of the class are used, which is then
            also imported for the files of other backends.
    """
    _registered[name] = RegisteredBackend(name, target, suffixes)


# This table spares `cifarx infer` both the metadata of the installed packages (30 ms) and the import of the backends.
register_backend("onnxruntime", "cifarx_serve.backends.onnxruntime.backend:OnnxRuntimeBackend", (".onnx",))
register_backend("torchscript", "cifarx_serve.backends.torch.torchscript:TorchScriptBackend", (".torchscript.pt",))
register_backend("exported_program", "cifarx_serve.backends.torch.exported_program:ExportedProgramBackend", (".pt2",))
register_backend("aot_inductor", "cifarx_serve.backends.torch.aot_inductor:AotInductorBackend", (".aoti.pt2",))
register_backend("openvino", "cifarx_serve.backends.openvino:OpenVinoBackend", (".openvino.zip",))
register_backend("litert", "cifarx_serve.backends.litert.backend:LiteRtBackend", (".tflite",))
register_backend("executorch", "cifarx_serve.backends.torch.executorch:ExecuTorchBackend", (".pte",))
register_backend("web", "cifarx_serve.backends.web.backend:WebBackend", (".web.onnx", ".web"))


def registered_backends() -> tuple[RegisteredBackend, ...]:
    """Return the registered backends in the order of their registration, so that a worker can register them too."""
    return tuple(_registered.values())


def backend_names() -> list[str]:
    """Return the names of all backends, sorted."""
    return sorted(_registered.keys() | _entry_points().keys())


def backend_class(name: str) -> type[Backend]:
    """Return the backend with this name.

    Raises:
        UsageError: there is none.
    """
    if registered := _registered.get(name):
        return _load(name, registered.target)
    if target := _entry_points().get(name):
        return _load(name, target)
    raise unknown_name_error("backend", name, backend_names())


def backend_suffixes(name: str) -> tuple[str, ...]:
    """Return the suffixes of the files that a backend opens, without importing it if it was registered with them.

    Raises:
        UsageError: there is no backend with this name.
    """
    if (registered := _registered.get(name)) and registered.suffixes:
        return registered.suffixes
    backend = backend_class(name)
    # The import may have registered it, as that of `cifarx_train` does for the entry point `pytorch`.
    registered = _registered.get(name)
    return registered.suffixes if registered and registered.suffixes else backend.suffixes


def backend_for(path: Path) -> type[Backend]:
    """Return the backend that opens a file.

    This is the backend of the format that the content of the file has. If the content is not recognized, or the suffix
    is that of another package's backend, it is the backend with the longest matching suffix. Registered backends take
    precedence over those of other packages.

    Raises:
        UsageError: no backend opens such a file.
    """
    by_suffix = _backend_by_suffix(path)
    name = by_suffix
    if by_suffix is None or by_suffix in _BACKEND_OF_FORMAT.values():
        name = _backend_by_content(path) or by_suffix
    if name:
        return backend_class(name)
    known = ", ".join(sorted({suffix for suffix, _ in _suffixes(backend_names())}))
    reason = " (its content is not recognized)" if path.is_file() else ""
    raise UsageError(f"no backend opens {path}{reason}", f"give a file that ends with {known}")


def _backend_by_content(path: Path) -> str | None:
    detected = detect_format(path)
    return _BACKEND_OF_FORMAT[detected] if detected else None


def _backend_by_suffix(path: Path) -> str | None:
    for names in (_registered.keys, backend_names):  # a registered backend spares the metadata of the packages
        if matching := [pair for pair in _suffixes(names()) if path.name.endswith(pair[0])]:
            return max(matching, key=lambda pair: len(pair[0]))[1]
    return None


def _suffixes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of a suffix and the name of its backend."""
    return [(suffix, name) for name in list(names) for suffix in backend_suffixes(name)]


def _opens(name: str, path: Path) -> bool:
    """Return whether a file has the suffix of a backend. For `x.aoti.pt2` that is the longer one, not `.pt2`."""
    longest = max((len(suffix) for suffix, _ in _suffixes(_registered) if path.name.endswith(suffix)), default=0)
    return any(path.name.endswith(suffix) and len(suffix) >= longest for suffix in backend_suffixes(name))


def read_spec(path: str | Path) -> ModelSpec:
    """Return the spec of a checkpoint or artifact.

    Raises:
        UsageError: no backend opens such a file.
        ModelFileError: the file is missing or damaged, or contains no spec.
        SpecError: the spec is malformed or has a newer schema.
    """
    path = model_file(Path(path))
    _require_model(path)
    return backend_for(path).read_spec(path)


def open_backend(
    path: str | Path, backend: str | None = None, device: str = "auto", stated: Mapping[str, Any] = NOTHING_STATED
) -> Backend:
    """Open a model file on a device.

    Args:
        path: the model file.
        backend: the name of the backend, or None to select it as `backend_for` does.
        device: the name of the device, as for `parse_device`.
        stated: what the user states about the model, see `Backend.open_stated`.

    Raises:
        UsageError: the backend or device is unknown, or the backend does not open such a file.
        ModelFileError: the file is missing or damaged, or does not match its checksum.
        DeviceError: the device is not available.
    """
    path, parsed = model_file(Path(path)), parse_device(device)
    if not backend:
        _require_model(path)
        return _open(backend_for(path), path, parsed, stated)
    selected = backend_class(backend)
    _require_model(path)
    if not _opens(backend, path) and _backend_by_content(path) != backend:
        suffixes = ", ".join(backend_suffixes(backend))
        raise UsageError(f"backend {backend} does not open {path}", f"give a file that ends with {suffixes}")
    return _open(selected, path, parsed, stated)


def _open(backend: type[Backend], path: Path, device: Device, stated: Mapping[str, Any]) -> Backend:
    if path.is_file():
        require_intact(path)
    return backend.open_stated(path, device, stated) if stated else backend(path, device)


def _require_model(path: Path) -> None:
    """Check that a path is one of a file, or of a directory with a network."""
    if not (path.is_dir() and _backend_by_content(path)):
        require_file(path)


def model_file(path: Path) -> Path:
    """Return the model file in a directory for browsers, or in an NVIDIA Triton model repository with one model.

    Other paths are returned as they are.
    """
    models = [*path.glob(WEB_MODEL), *path.glob("*/1/model.onnx")] if path.is_dir() else []
    return models[0] if len(models) == 1 else path


def find_model(directory: Path, backend: str) -> Path:
    """Return the newest model in a directory that the backend opens: a file, or a directory for browsers.

    Raises:
        UsageError: there is no backend with this name.
        ModelFileError: there is no such file.
    """
    suffixes = backend_suffixes(backend)
    matching = [
        path
        for path in directory.iterdir()
        if path.name[0] != "." and _opens(backend, path) and model_file(path).is_file()
    ]
    if not matching:
        raise ModelFileError(
            f"no file for backend {backend} (*{', *'.join(suffixes)}) in {directory.resolve()}",
            "give one with --model, or create one with `cifarx train` and `cifarx export`",
        )
    return max(matching, key=lambda path: (path.stat().st_mtime_ns, path.name))


@cache
def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points  # takes 30 ms, and most runs do not need it

    return {entry.name: entry.value for entry in entry_points(group=GROUP)}


def _load(name: str, target: str) -> type[Backend]:
    module, _, attribute = target.partition(":")
    try:
        backend = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"backend {name} ({target}) cannot be loaded ({error})", "fix or reinstall its package"
        ) from error
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise UsageError(f"backend {name} ({target}) is not a Backend", "fix its package")
    return backend
