"""ONNX Runtime: `.onnx` files, on the CPU or an NVIDIA GPU, there also by TensorRT. Needs no PyTorch."""

import copy
import os
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.base import Backend, TensorInfo, require_file
from cifarx_serve.backends.onnxruntime.model_reader import read_onnx
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, FallbackWarning, ModelFileError
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import available_cpus, shares_cpus

if TYPE_CHECKING:
    import onnxruntime

    from cifarx_serve.backends.onnxruntime.io_binding import BoundSession, TimedSession

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

# Threads that wait for work spin by default, on CPUs that others could use.
_SPINNING: Final = "session.intra_op.allow_spinning"

_CPU: Final[list[tuple[str, dict[str, str]]]] = [("CPUExecutionProvider", {})]
_CUDA: Final = "CUDAExecutionProvider"
_TENSORRT: Final = "TensorrtExecutionProvider"

_ENGINE_BATCHES: Final = (1, 8, 64)
"""The least, the best and the largest batch of a TensorRT engine: its kernels are chosen at the second."""

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
        self._device = device
        self._session: Any = _open_session(path, device, self.spec)
        self.provider = self._session.get_providers()[0]
        self._options: Any = None
        self._bound: BoundSession | None = None
        if self.provider == _CUDA:
            self._bind()

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Makes no session: memory and time do not grow with the weights."""
        require_file(path)
        document = read_onnx(path).metadata.get(SPEC_KEY.encode())
        if document is None:
            raise ModelFileError(f"{path} carries no model spec", "make it with `cifarx export`")
        return ModelSpec.from_json(document, str(path))

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        if self.provider == _TENSORRT and len(batch) > (largest := _ENGINE_BATCHES[-1]):
            return np.concatenate([self.run(batch[start : start + largest]) for start in range(0, len(batch), largest)])
        try:
            if self._bound is not None and len(batch) <= self._bound.largest:
                return self._bound.run(batch)
            logits: NDArray[np.float32] = self._session.run(["logits"], {"input": batch}, self._options)[0]
        except Exception as error:  # the library's errors have no common base
            problem = f"{self._path} does not run on {batch.dtype} {batch.shape} ({_reason(error)})"
            raise ModelFileError(problem, "export it again") from error
        return logits

    def single_threaded(self) -> Backend:
        """A second session on the same file, which starts no threads of its own."""
        if self.provider != _CPU[0][0]:
            return self
        other = copy.copy(self)
        other._session = _session(self._path, _CPU, threads=1)
        return other

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(port.name, _DTYPES.get(port.type, port.type), tuple(port.shape))
            for port in [*self._session.get_inputs(), *self._session.get_outputs()]
        )

    def device_time(self, batch: NDArray[Any]) -> float | None:
        """On CUDA, of a second session on the file, made for it alone: ONNX Runtime hides the stream of the first.

        Where it does not work, as for want of memory, a benchmark goes on without: None, with a FallbackWarning.
        """
        if self._bound is None:
            return None
        try:
            return self._timed.device_time(batch) if self._timed else None
        except Exception as error:  # the library's errors have no common base
            told = f"no time on the device of {self._path}: {_reason(error)}"
            warnings.warn(told, FallbackWarning, stacklevel=2)
            return None

    @cached_property
    def _timed(self) -> "TimedSession | None":
        assert self._bound is not None, "the CPU has no such time"
        from cifarx_serve.backends.onnxruntime import cuda_timer, io_binding

        number = self._device.number
        if (clock := cuda_timer.open_clock(number)) is None:
            return None
        try:
            session = _cuda_session(self._path, number, {"user_compute_stream": str(clock.stream)})
        except DeviceError:
            clock.close()
            raise
        return io_binding.TimedSession(self._bound.on(session), clock)

    def close(self) -> None:
        if timed := self.__dict__.pop("_timed", None):
            timed.close()
        self._bound = None
        self._session = None

    def _bind(self) -> None:
        """With memory of its own on the GPU and CUDA graphs; told where that does not work, and why."""
        from cifarx_serve.backends.onnxruntime import io_binding

        taken = self.spec.input
        shape = (taken.channels, taken.height, taken.width)
        self._options = io_binding.without_graph()
        bound = io_binding.BoundSession(self._session, "cuda", self._device.number, shape, len(self.spec.class_names))
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
    from cifarx_serve.backends.onnxruntime.io_binding import without_graph

    try:
        session.run(None, {"x": np.zeros(1, np.float32)}, without_graph())
    except Exception as error:  # the library's errors have no common base
        return DeviceError(f"ONNX Runtime cannot run on {device} ({_reason(error)})", "use --device cpu")
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


def _open_session(path: Path | bytes, device: Device, spec: ModelSpec | None = None) -> "onnxruntime.InferenceSession":
    import onnxruntime

    onnxruntime.set_default_logger_severity(_LOG_FATAL)
    if device.kind == "mps":
        raise DeviceError("ONNX Runtime has no device mps", "use --device cpu, or a backend of PyTorch's")
    if device.kind == "cuda":
        return _cuda_session(path, device.number)
    if device.kind == "tensorrt":
        return _tensorrt_session(path, device.number, spec)
    if device.kind == "auto" and cuda_libraries.has_driver():
        try:
            return _cuda_session(path, device.number)
        except DeviceError as error:
            warnings.warn(f"running on the CPU: {error}", FallbackWarning, stacklevel=2)
    return _session(path, _CPU)


def _cuda_session(
    path: Path | bytes, number: int, further: dict[str, str] | None = None
) -> "onnxruntime.InferenceSession":
    """A session on CUDA or an error; `further` are options of the provider."""
    if not cuda_libraries.has_driver() and (problem := cuda_libraries.missing()):
        raise problem
    cuda_libraries.preload()
    options = {
        **_cuda_options(number),
        "enable_cuda_graph": "1",  # of the runs that ask for it: see `bound_session`
        **(further or {}),
    }
    return _given_session(path, Device("cuda", number), [(_CUDA, options)], cuda_libraries.missing)


def _tensorrt_session(path: Path | bytes, number: int, spec: ModelSpec | None) -> "onnxruntime.InferenceSession":
    """A session on TensorRT, with CUDA for the operators that it does not have, or an error.

    An engine for a range of batch sizes is built here, which takes tens of seconds, or read from where it was kept.
    """
    from cifarx_serve.backends.onnxruntime import tensorrt_engines, tensorrt_libraries

    if not cuda_libraries.has_driver() and (problem := tensorrt_libraries.missing()):
        raise problem
    tensorrt_libraries.preload()
    shapes = _engine_shapes(spec)
    options = {
        "device_id": str(number),
        "trt_fp16_enable": "1" if spec and spec.precision == "fp16" else "0",
        "trt_cuda_graph_enable": "0",  # it would need bound memory, and records one shape
        **shapes,
    }
    # Without shapes an engine is built when a batch is there, and again when one of another size comes: none to keep.
    keeping: AbstractContextManager[dict[str, str]] = (
        tensorrt_engines.kept_engines(path) if shapes and isinstance(path, Path) else nullcontext({})
    )
    with keeping as kept:
        providers = [(_TENSORRT, {**options, **kept}), (_CUDA, _cuda_options(number))]
        return _given_session(path, Device("tensorrt", number), providers, tensorrt_libraries.missing)


def _engine_shapes(spec: ModelSpec | None) -> dict[str, str]:
    """The batch sizes to build an engine for, where TensorRT takes the whole graph.

    It takes parts of an int8 file, for its unsigned activations, and of one that preprocesses; ONNX Runtime then wants
    shapes of what goes in between.
    """
    if spec is None or spec.precision == "int8" or spec.embedded_preprocessing:
        return {}
    image = f"{spec.input.channels}x{spec.input.height}x{spec.input.width}"
    return {
        f"trt_profile_{name}_shapes": f"input:{batch}x{image}"
        for name, batch in zip(("min", "opt", "max"), _ENGINE_BATCHES, strict=True)
    }


def _cuda_options(number: int) -> dict[str, str]:
    return {
        "device_id": str(number),
        "use_tf32": "0",  # on by default, and a thousand times outside fp32's tolerance
        "cudnn_conv_algo_search": "HEURISTIC",  # the default measures every algorithm for every new batch size
    }


def _given_session(
    path: Path | bytes,
    device: Device,
    providers: list[tuple[str, dict[str, str]]],
    missing: Callable[[], DeviceError | None],
) -> "onnxruntime.InferenceSession":
    """A session on the first provider or an error: the library itself would go on with another and only log it."""
    try:
        session = _session(path, providers, {"session.disable_cpu_ep_fallback": "1"})
    except ModelFileError as error:
        raise missing() or DeviceError(
            f"ONNX Runtime cannot use {device} ({error.problem})", "run `cifarx doctor`"
        ) from error
    if (given := session.get_providers()[0]) != providers[0][0]:
        raise missing() or DeviceError(f"{device} was asked for and ONNX Runtime gave {given}", "run `cifarx doctor`")
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
    spinning = {_SPINNING: "0"} if shares_cpus() else {}
    for key, value in {_FOLDED_SIZE: str(_folded_size(model)), **spinning, **(config or {})}.items():
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
