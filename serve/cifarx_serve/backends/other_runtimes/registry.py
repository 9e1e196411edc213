"""Open an ONNX file in a runtime that the user names."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cifarx_serve.backends.base import Backend, require_file
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError, unknown_name_error
from cifarx_serve.files.checksum import require_intact
from cifarx_serve.files.file_format import FileFormat, detect_format

RUNTIMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "opencv": "cifarx_serve.backends.other_runtimes.opencv:OpenCvBackend",
        "openvino": "cifarx_serve.backends.other_runtimes.openvino:OpenVinoOnnxBackend",
        "tract": "cifarx_serve.backends.other_runtimes.tract:TractBackend",
        "web": "cifarx_serve.backends.web.backend:WebBackend",
    }
)
"""The backend of each runtime, imported when it is needed."""


def require_runtime(name: str, path: Path) -> None:
    """Check the name of a runtime, and that a file is one for it.

    Raises:
        UsageError: there is no such runtime, or it is not an ONNX file.
        ModelFileError: the file is missing.
    """
    if name not in RUNTIMES:
        raise unknown_name_error("runtime", name, RUNTIMES)
    require_file(path)
    if detect_format(path) is not FileFormat.ONNX:
        raise UsageError(f"runtime {name} does not open {path}, which is not an ONNX file", "leave --runtime out")


def open_in_runtime(name: str, path: Path, device: Device) -> Backend:
    """Open an ONNX file with a spec in a runtime.

    Raises:
        UsageError: as for `require_runtime`, or the runtime is not installed.
        ModelFileError: the file is damaged, has no spec, or the runtime cannot run it.
        DeviceError: the device is not the CPU.
    """
    require_runtime(name, path)
    require_intact(path)
    module, _, attribute = RUNTIMES[name].partition(":")
    backend: type[Backend] = getattr(import_module(module), attribute)
    return backend(path, device)
