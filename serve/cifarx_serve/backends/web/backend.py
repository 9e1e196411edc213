"""Run ONNX files as a browser does: with ONNX Runtime Web, in a Node.js process of its own."""

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend, TensorInfo, parse_spec, require_file
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.onnxruntime.model_reader import read_model_info
from cifarx_serve.backends.web.directory import (
    MODEL_FILE,
    SCRIPT_FILE,
    SPEC_FILE,
    WASM_FILE,
    file_sha256,
    require_intact_directory,
)
from cifarx_serve.backends.web.node_package import PACKAGE, NodePackage, find_package
from cifarx_serve.backends.web.node_runtime import NodeError, NodeRuntime, TensorDescription
from cifarx_serve.devices import Device, out_of_memory_error
from cifarx_serve.errors import DeviceError, ModelFileError, error_message
from cifarx_serve.spec import ModelSpec

_VERSION: Final = re.compile(r"[0-9A-Za-z.-]{1,40}")

# The library puts this in front of its own messages.
_PREFIX: Final = re.compile(r"^.*?ERROR_MESSAGE: ")
_OUT_OF_MEMORY: Final = re.compile(r"bad_alloc|out of memory|OOM|[Aa]llocation failed|Invalid typed array length")


class WebBackend(Backend):
    """A model in WebAssembly, on one thread.

    It opens the model of a directory `NAME.web`, after the checksums of all its files, and any other ONNX file.
    """

    name = "web"
    suffixes = (".web.onnx", ".web")

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        if device.type not in ("auto", "cpu"):
            raise DeviceError(f"{path} runs on the CPU, but {device.type} was requested", "use --device cpu")
        self._path = path
        package = find_package()
        if path.name == MODEL_FILE:
            _require_same_runtime(path.parent, package, self.spec)
        try:
            self._runtime = NodeRuntime(package, path.read_bytes())
        except NodeError as error:
            if _OUT_OF_MEMORY.search(str(error)):
                raise out_of_memory_error("cpu") from error
            raise ModelFileError(
                f"{path} is not a model that ONNX Runtime Web runs ({_message(error)})", "export it again"
            ) from error
        found = self._runtime.description
        self.provider = f"ONNX Runtime Web {found.version} (WebAssembly, Node.js {found.node.removeprefix('v')})"

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without Node.js."""
        require_file(path)
        return parse_spec(read_model_info(path).metadata.get(SPEC_KEY.encode()), path)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        try:
            outputs: NDArray[np.float32] = self._runtime.run(batch, self.spec.output)
        except NodeError as error:
            if _OUT_OF_MEMORY.search(str(error)):
                raise out_of_memory_error("cpu", len(batch), None, None) from error
            problem = f"{self._path} cannot run on {batch.dtype} {batch.shape} ({_message(error)})"
            raise ModelFileError(problem, "export it again") from error
        return outputs

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        found = self._runtime.description
        return tuple(map(_tensor_info, (*found.inputs, *found.outputs)))

    def close(self) -> None:
        self._runtime.close()


def _tensor_info(found: TensorDescription) -> TensorInfo:
    return TensorInfo(found.name, found.type, found.shape)


def _message(error: NodeError) -> str:
    return error_message(NodeError(_PREFIX.sub("", error_message(error))))


def _require_same_runtime(directory: Path, package: NodePackage, spec: ModelSpec) -> None:
    """Check the files of a directory, and that the installed package has the same runtime as a browser would load.

    The scripts in the directory never run in Node.js: their author is unknown.

    Raises:
        ModelFileError: a file was changed, the spec is not that of the model, or the runtime is another one.
    """
    checksums = require_intact_directory(directory)
    stated = (directory / SPEC_FILE).read_bytes()
    if ModelSpec.from_json(stated, str(directory / SPEC_FILE)) != spec:
        raise ModelFileError(f"{directory / SPEC_FILE} is not the spec of {MODEL_FILE}", "export it again")
    for name, installed in ((SCRIPT_FILE, package.script), (WASM_FILE, package.wasm)):
        if checksums[name] == file_sha256(installed):
            continue
        made_with = (spec.exporter or {}).get(PACKAGE, "")
        if _VERSION.fullmatch(made_with) and made_with != package.version:
            problem = f"{directory} was made with {PACKAGE} {made_with}, but {package.version} is installed"
            raise ModelFileError(problem, f"npm install {PACKAGE}@{made_with}, or export it again")
        raise ModelFileError(f"{directory / name} is not that of {PACKAGE} {package.version}", "export it again")
