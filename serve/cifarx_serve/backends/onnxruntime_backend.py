"""ONNX Runtime: `.onnx` files, on the CPU or an NVIDIA GPU. Needs no PyTorch."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.base import Backend, require_file
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, FallbackWarning, ModelFileError
from cifarx_serve.spec import ModelSpec
from cifarx_serve.threads import available_cpus

if TYPE_CHECKING:
    import onnxruntime

SPEC_KEY: Final = "cifarx.spec"
"""The key of the model spec in an ONNX file's `metadata_props`."""

# y = Identity(x), x float32 of any length, opset 13: the smallest model there is to try a provider with.
_PROBE: Final = bytes.fromhex(
    "08083a390a100a017812017922084964656e746974791201675a100a0178120b0a09080112050a0312016e"
    "62100a0179120b0a09080112050a0312016e42040a00100d"
)

# Errors come back as exceptions, where they are told in one line; the library's own log would say them again.
_LOG_FATAL: Final = 4


class OnnxRuntimeBackend(Backend):
    """One ONNX Runtime session; `provider` is the first of those that the session reports after it is made."""

    name = "onnxruntime"
    suffixes = (".onnx",)

    def __init__(self, path: Path, device: Device) -> None:
        require_file(path)
        self._session: Any = _open_session(path, device)
        self.provider = self._session.get_providers()[0]
        self.spec = _spec(self._session, path)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        require_file(path)
        return _spec(_session(path, [("CPUExecutionProvider", {})], optimize=False), path)

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._session.run(["logits"], {"input": batch})[0]
        return logits

    def close(self) -> None:
        self._session = None


def provider_problem(device: Device) -> DeviceError | None:
    """Why ONNX Runtime cannot run on a device, found by running a model there, or None where it can."""
    try:
        session = _open_session(_PROBE, device)
    except DeviceError as error:
        return error
    session.run(None, {"x": np.zeros(1, np.float32)})
    return None


def _spec(session: "onnxruntime.InferenceSession", path: Path) -> ModelSpec:
    try:
        metadata = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} has damaged metadata ({error})", "export it again") from error
    if SPEC_KEY not in metadata:
        raise ModelFileError(f"{path} carries no model spec", "make it with `cifarx export`")
    return ModelSpec.from_json(metadata[SPEC_KEY], str(path))


def _open_session(path: Path | bytes, device: Device) -> "onnxruntime.InferenceSession":
    import onnxruntime

    onnxruntime.set_default_logger_severity(_LOG_FATAL)
    if device.kind == "mps":
        raise DeviceError("ONNX Runtime has no device mps", "use --device cpu, or a backend of PyTorch's")
    if device.kind == "cuda":
        return _cuda_session(path, device.number)
    if device.kind == "auto" and cuda_libraries.has_driver():
        try:
            return _cuda_session(path, device.number)
        except DeviceError as error:
            warnings.warn(f"running on the CPU: {error}", FallbackWarning, stacklevel=2)
    return _session(path, [("CPUExecutionProvider", {})])


def _cuda_session(path: Path | bytes, index: int) -> "onnxruntime.InferenceSession":
    """A session on CUDA or an error: the library itself would go on with the CPU and only log it."""
    if not cuda_libraries.has_driver() and (problem := cuda_libraries.missing()):
        raise problem
    cuda_libraries.preload()
    options = {
        "device_id": str(index),
        "use_tf32": "0",  # on by default, and a thousand times outside fp32's tolerance
        "cudnn_conv_algo_search": "HEURISTIC",  # the default measures every algorithm for every new batch size
    }
    config = {"session.disable_cpu_ep_fallback": "1"}
    try:
        session = _session(path, [("CUDAExecutionProvider", options)], config)
    except ModelFileError as error:
        raise cuda_libraries.missing() or DeviceError(
            f"ONNX Runtime cannot use cuda:{index} ({error.problem})", "run `cifarx doctor`"
        ) from error
    if (given := session.get_providers()[0]) != "CUDAExecutionProvider":
        raise cuda_libraries.missing() or DeviceError(
            f"cuda:{index} was asked for and ONNX Runtime gave {given}", "run `cifarx doctor`"
        )
    return session


def _session(
    model: Path | bytes,
    providers: list[tuple[str, dict[str, str]]],
    config: dict[str, str] | None = None,
    optimize: bool = True,
) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if (cpus := available_cpus()) != os.cpu_count():
        options.intra_op_num_threads = cpus  # explicit counts cost the pinning to cores, so only where needed
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    try:
        # enable_fallback=0: the library would print to standard output and go on with the CPU.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # the library's errors have no common base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__  # some say nothing
        path = model if isinstance(model, Path) else "the probe"
        raise ModelFileError(f"{path} is not an ONNX model that can be run ({reason})", "export it again") from error
