"""Find the npm package `onnxruntime-web` where Node.js would: cifarx installs nothing and brings no copy of it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cifarx_serve.errors import UsageError, error_message

PACKAGE: Final = "onnxruntime-web"

_MIN_VERSION: Final = (1, 20)
"""The oldest version with the files below."""


class NodePackage(NamedTuple):
    """The installed package.

    Attributes:
        folder: the folder of its `package.json`.
        version: its version, such as "1.30.0".
    """

    folder: Path
    version: str

    @property
    def script(self) -> Path:
        """The JavaScript module for WebAssembly alone, with all that it imports."""
        return self.folder / "dist" / "ort.wasm.bundle.min.mjs"

    @property
    def wasm(self) -> Path:
        """The WebAssembly, which also runs on a single thread."""
        return self.folder / "dist" / "ort-wasm-simd-threaded.wasm"


class _Manifest(msgspec.Struct):
    version: str


def find_package() -> NodePackage:
    """Return the package that a script in the current directory would import.

    Node.js looks in `node_modules` of the directory and of each one above it, and then in the directories of the
    variable `NODE_PATH`.

    Raises:
        UsageError: it is not installed, or too old, or incomplete.
    """
    for directory in _module_directories():
        manifest = directory / PACKAGE / "package.json"
        if manifest.is_file():
            return _open_package(manifest)
    raise UsageError(f"{PACKAGE} is not installed in this directory or one above it", f"npm install {PACKAGE}")


def _module_directories() -> Iterator[Path]:
    current = Path.cwd()
    for directory in (current, *current.parents):
        yield directory / "node_modules"
    yield from map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep)))


def _open_package(manifest: Path) -> NodePackage:
    remedy = f"npm install {PACKAGE}@latest"
    try:
        version = msgspec.json.decode(manifest.read_bytes(), type=_Manifest).version
        package = NodePackage(manifest.parent, version)
        numbers = tuple(int(number) for number in version.partition("-")[0].split("."))
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise UsageError(f"{manifest} cannot be read ({error_message(error)})", remedy) from error
    if numbers < _MIN_VERSION:
        needed = ".".join(map(str, _MIN_VERSION))
        raise UsageError(f"{manifest.parent} is version {version}, but {needed} or newer is needed", remedy)
    for file in (package.script, package.wasm):
        if not file.is_file():
            raise UsageError(f"{PACKAGE} {version} has no {file.name}", remedy)
    return package
