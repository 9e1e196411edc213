"""ONNX Runtime: `.onnx` files, on the CPU or an NVIDIA GPU. Needs no PyTorch."""

import copy
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.base import Backend, Port, require_file
from cifarx_serve.backends.onnx_file import read_onnx
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, FallbackWarning, ModelFileError
from cifarx_serve.spec import ModelSpec
from cifarx_serve.threads import available_cpus

if TYPE_CHECKING:
    import onnxruntime

    from cifarx_serve.backends.bound_session import BoundSession

SPEC_KEY: Final = "cifarx.spec"
"""The key of the model spec in an ONNX file's `metadata_props`."""

# y = Identity(x), x float32 of any length, opset 13: the smallest model there is to try a provider with.
_PROBE: Final = bytes.fromhex(
    "08083a390a100a017812017922084964656e746974791201675a100a0178120b0a09080112050a0312016e"
    "62100a0179120b0a09080112050a0312016e42040a00100d"
)

_DTYPES: Final = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}

# At the opening, nodes of constants are run and replaced by what they give; a few bytes of shape can ask for any size.
_FOLDED_SIZE: Final = "optimization.constant_folding_max_output_size_in_bytes"

_CPU: Final[list[tuple[str, dict[str, str]]]] = [("CPUExecutionProvider", {})]
_CUDA: Final = "CUDAExecutionProvider"

# Errors come back as exceptions, where they are told in one line; the library's own log would say them again.
_LOG_FATAL: Final = 4


class OnnxRuntimeBackend(Backend):
    """One ONNX Runtime session; `provider` is the first of those that the session reports after it is made.

    Nothing of a file runs before its bytes were looked at; see `onnx_file`.
    """

    name = "onnxruntime"
    suffixes = (".onnx",)

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        _require_runtime(self.spec, path)
        self._path = path
        self._session: Any = _open_session(path, device)
        self.provider = self._session.get_providers()[0]
        self._options: Any = None
        self._bound: BoundSession | None = None
        if self.provider == _CUDA:
            self._bind(device)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Makes no session: memory and time do not grow with the weights."""
        require_file(path)
        document = read_onnx(path).metadata.get(SPEC_KEY.encode())
        if document is None:
            raise ModelFileError(f"{path} carries no model spec", "make it with `cifarx export`")
        return ModelSpec.from_json(document, str(path))

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        try:
            if self._bound is not None and len(batch) <= self._bound.largest:
                return self._bound.run(batch)
            logits: NDArray[np.float32] = self._session.run(["logits"], {"input": batch}, self._options)[0]
        except Exception as error:  # the library's errors have no common base
            problem = f"{self._path} does not run on {batch.dtype} {batch.shape} ({_reason(error)})"
            raise ModelFileError(problem, "export it again") from error
        return logits

    def for_threads(self) -> Backend:
        """A second session on the same file, which starts no threads of its own."""
        if self.provider != _CPU[0][0]:
            return self
        other = copy.copy(self)
        other._session = _session(self._path, _CPU, threads=1)
        return other

    def ports(self) -> tuple[Port, ...]:
        return tuple(
            Port(port.name, _DTYPES.get(port.type, port.type), tuple(port.shape))
            for port in [*self._session.get_inputs(), *self._session.get_outputs()]
        )

    def close(self) -> None:
        self._bound = None
        self._session = None

    def _bind(self, device: Device) -> None:
        """With memory of its own on the GPU and CUDA graphs; told where that does not work, and why."""
        from cifarx_serve.backends import bound_session  # here, because the CPU's start-up needs none of it

        taken = self.spec.input
        shape = (taken.channels, taken.height, taken.width)
        self._options = bound_session.without_graph()
        bound = bound_session.BoundSession(self._session, "cuda", device.number, shape, len(self.spec.class_names))
        try:
            problem = bound.problem()
        except Exception as error:  # the library's errors have no common base
            problem = _reason(error)
        if problem is None:
            self._bound = bound
        else:
            warnings.warn(f"running {self._path} without CUDA graphs: {problem}", FallbackWarning, stacklevel=3)


def provider_problem(device: Device) -> DeviceError | None:
    """Why ONNX Runtime cannot run on a device, found by running a model there, or None where it can."""
    try:
        session = _open_session(_PROBE, device)
    except DeviceError as error:
        return error
    from cifarx_serve.backends.bound_session import without_graph

    session.run(None, {"x": np.zeros(1, np.float32)}, without_graph())
    return None


def _require_runtime(spec: ModelSpec, path: Path) -> None:
    """Raises ModelFileError where the file asks for a newer ONNX Runtime than the one that is here."""
    import onnxruntime

    needed, here = spec.minimum_onnxruntime, onnxruntime.__version__
    if needed is None:
        return
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6}){1,2}", needed):
        raise ModelFileError(f"{path} needs ONNX Runtime {needed[:60]!r}, which is no version", "export it again")
    if _release(needed) > _release(here):
        raise ModelFileError(
            f"{path} needs ONNX Runtime >= {needed}, and {here} is installed", f'pip install "onnxruntime>={needed}"'
        )


def _release(version: str) -> list[int]:
    """The numbers of "1.31.1" or "1.32.0.dev3", to be compared."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


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
    return _session(path, _CPU)


def _cuda_session(path: Path | bytes, index: int) -> "onnxruntime.InferenceSession":
    """A session on CUDA or an error: the library itself would go on with the CPU and only log it."""
    if not cuda_libraries.has_driver() and (problem := cuda_libraries.missing()):
        raise problem
    cuda_libraries.preload()
    options = {
        "device_id": str(index),
        "use_tf32": "0",  # on by default, and a thousand times outside fp32's tolerance
        "enable_cuda_graph": "1",  # of the runs that ask for it: see `bound_session`
        "cudnn_conv_algo_search": "HEURISTIC",  # the default measures every algorithm for every new batch size
    }
    config = {"session.disable_cpu_ep_fallback": "1"}
    try:
        session = _session(path, [(_CUDA, options)], config)
    except ModelFileError as error:
        raise cuda_libraries.missing() or DeviceError(
            f"ONNX Runtime cannot use cuda:{index} ({error.problem})", "run `cifarx doctor`"
        ) from error
    if (given := session.get_providers()[0]) != _CUDA:
        raise cuda_libraries.missing() or DeviceError(
            f"cuda:{index} was asked for and ONNX Runtime gave {given}", "run `cifarx doctor`"
        )
    return session


def _session(
    model: Path | bytes,
    providers: list[tuple[str, dict[str, str]]],
    config: dict[str, str] | None = None,
    threads: int | None = None,
) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    if (cpus := threads or available_cpus()) != os.cpu_count():
        options.intra_op_num_threads = cpus  # explicit counts cost the pinning to cores, so only where needed
    for key, value in {_FOLDED_SIZE: str(_folded_size(model)), **(config or {})}.items():
        options.add_session_config_entry(key, value)
    try:
        # enable_fallback=0: the library would print to standard output and go on with the CPU.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # the library's errors have no common base
        path = model if isinstance(model, Path) else "the probe"
        problem = f"{path} is not an ONNX model that can be run ({_reason(error)})"
        raise ModelFileError(problem, "export it again") from error


def _folded_size(model: Path | bytes) -> int:
    """The most bytes that a node may be replaced by: all weights of the file from 8 bits to 32, and some."""
    return (1 << 20) + 4 * (model.stat().st_size if isinstance(model, Path) else len(model))


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__  # some say nothing
