"""Run `.onnx` files with ONNX Runtime, on the CPU, CUDA or TensorRT. This backend does not need PyTorch."""

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
from cifarx_serve.backends.base import Backend, TensorInfo, parse_spec, require_file
from cifarx_serve.backends.onnxruntime.model_reader import read_model_info
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, FallbackWarning, ModelFileError, error_message
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import available_cpus, has_cpu_limit

if TYPE_CHECKING:
    import onnxruntime

    from cifarx_serve.backends.onnxruntime.io_binding import BoundSession, TimedSession

SPEC_KEY: Final = "cifarx.spec"
"""The key of the model spec in the `metadata_props` of an ONNX file."""

# y = Identity(x), x float32 of any length, opset 13: the smallest model that can test an execution provider.
_TEST_MODEL: Final = bytes.fromhex(
    "08083a390a100a017812017922084964656e746974791201675a100a0178120b0a09080112050a0312016e"
    "62100a0179120b0a09080112050a0312016e42040a00100d"
)

_DTYPES: Final = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}

# When a session is created, constant nodes are replaced by their outputs. A few bytes of shape can declare any size.
_MAX_FOLDED_SIZE: Final = "optimization.constant_folding_max_output_size_in_bytes"

# By default, idle threads spin on CPUs that other processes could use.
_ALLOW_SPINNING: Final = "session.intra_op.allow_spinning"

_CPU: Final[list[tuple[str, dict[str, str]]]] = [("CPUExecutionProvider", {})]
_CUDA: Final = "CUDAExecutionProvider"
_TENSORRT: Final = "TensorrtExecutionProvider"

_ENGINE_BATCH_SIZES: Final = (1, 8, 64)
"""The minimum, optimal and maximum batch size of a TensorRT engine. Its kernels are chosen for the optimal one."""

# Errors are raised as exceptions with a message of one line, so the library's log would only repeat them.
_LOG_FATAL: Final = 4


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session. `provider` is the first execution provider that the session reports.

    The bytes of a file are checked before the library opens it; see `model_reader`.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        _require_runtime(self.spec, path)
        self._path = path
        self._device = device
        self._session: Any = _open_session(path, device, self.spec)
        self.provider = self._session.get_providers()[0]
        self._run_options: Any = None
        self._bound: BoundSession | None = None
        if self.provider == _CUDA:
            self._bind()

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without creating a session. Memory and time do not grow with the weights."""
        require_file(path)
        return parse_spec(read_model_info(path).metadata.get(SPEC_KEY.encode()), path)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        if self.provider == _TENSORRT and len(batch) > (limit := _ENGINE_BATCH_SIZES[-1]):
            return np.concatenate([self.run(batch[start : start + limit]) for start in range(0, len(batch), limit)])
        try:
            if self._bound is not None and len(batch) <= self._bound.max_batch_size:
                return self._bound.run(batch)
            logits: NDArray[np.float32] = self._session.run(["logits"], {"input": batch}, self._run_options)[0]
        except Exception as error:  # the library's exceptions have no common base class
            problem = f"{self._path} cannot run on {batch.dtype} {batch.shape} ({error_message(error)})"
            raise ModelFileError(problem, "export it again") from error
        return logits

    def single_threaded(self) -> Backend:
        """Return a backend with a second session on the same file, which starts no threads."""
        if self.provider != _CPU[0][0]:
            return self
        other = copy.copy(self)
        other._session = _create_session(self._path, _CPU, threads=1)
        return other

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(tensor.name, _DTYPES.get(tensor.type, tensor.type), tuple(tensor.shape))
            for tensor in [*self._session.get_inputs(), *self._session.get_outputs()]
        )

    def device_time(self, batch: NDArray[Any]) -> float | None:
        """Return the time of a run in microseconds, on CUDA only.

        It is measured in a second session on the same file, because ONNX Runtime does not expose the stream of the
        first one. If that fails, for example for lack of memory, the result is None with a FallbackWarning.
        """
        if self._bound is None:
            return None
        try:
            return self._timed.device_time(batch) if self._timed else None
        except Exception as error:  # the library's exceptions have no common base class
            message = f"cannot measure the device time of {self._path}: {error_message(error)}"
            warnings.warn(message, FallbackWarning, stacklevel=2)
            return None

    @cached_property
    def _timed(self) -> "TimedSession | None":
        assert self._bound is not None, "only a session on CUDA can be timed"
        from cifarx_serve.backends.onnxruntime import cuda_timer, io_binding

        index = self._device.index
        if (timer := cuda_timer.open_cuda_timer(index)) is None:
            return None
        try:
            session = _cuda_session(self._path, index, {"user_compute_stream": str(timer.stream)})
        except DeviceError:
            timer.close()
            raise
        return io_binding.TimedSession(self._bound.with_session(session), timer)

    def close(self) -> None:
        if timed := self.__dict__.pop("_timed", None):
            timed.close()
        self._bound = None
        self._session = None

    def _bind(self) -> None:
        """Use IO binding and CUDA graphs, or issue a FallbackWarning with the reason if they do not work."""
        from cifarx_serve.backends.onnxruntime import io_binding

        image = self.spec.input
        shape = (image.channels, image.height, image.width)
        self._run_options = io_binding.run_options()
        bound = io_binding.BoundSession(self._session, "cuda", self._device.index, shape, len(self.spec.class_names))
        try:
            problem = bound.find_mismatch()
        except Exception as error:  # the library's exceptions have no common base class
            problem = error_message(error)
        if problem is None:
            self._bound = bound
        else:
            warnings.warn(f"running {self._path} without CUDA graphs: {problem}", FallbackWarning, stacklevel=3)


def provider_error(device: Device) -> DeviceError | None:
    """Return why ONNX Runtime cannot run on a device, or None. This runs a small model on the device."""
    try:
        session = _open_session(_TEST_MODEL, device)
    except DeviceError as error:
        return error
    from cifarx_serve.backends.onnxruntime.io_binding import run_options

    try:
        session.run(None, {"x": np.zeros(1, np.float32)}, run_options())
    except Exception as error:  # the library's exceptions have no common base class
        return DeviceError(f"ONNX Runtime cannot run on {device} ({error_message(error)})", "use --device cpu")
    return None


def _require_runtime(spec: ModelSpec, path: Path) -> None:
    """Raise ModelFileError if the file requires a newer ONNX Runtime than the installed one."""
    import onnxruntime

    required, installed = spec.minimum_onnxruntime, onnxruntime.__version__
    if required is None:
        return
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6}){1,2}", required):
        raise ModelFileError(
            f"{path} requires ONNX Runtime {required[:60]!r}, which is not a version", "export it again"
        )
    if _release(required) > _release(installed):
        raise ModelFileError(
            f"{path} requires ONNX Runtime >= {required}, but {installed} is installed",
            f'pip install "onnxruntime>={required}"',
        )


def _release(version: str) -> list[int]:
    """Return the numbers of a version such as "1.31.1" or "1.32.0.dev3", for comparison."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _open_session(path: Path | bytes, device: Device, spec: ModelSpec | None = None) -> "onnxruntime.InferenceSession":
    import onnxruntime

    onnxruntime.set_default_logger_severity(_LOG_FATAL)
    if device.type == "mps":
        raise DeviceError("ONNX Runtime does not support device mps", "use --device cpu, or a PyTorch backend")
    if device.type == "cuda":
        return _cuda_session(path, device.index)
    if device.type == "tensorrt":
        return _tensorrt_session(path, device.index, spec)
    if device.type == "auto" and cuda_libraries.has_driver():
        try:
            return _cuda_session(path, device.index)
        except DeviceError as error:
            warnings.warn(f"running on the CPU: {error}", FallbackWarning, stacklevel=2)
    return _create_session(path, _CPU)


def _cuda_session(
    path: Path | bytes, index: int, extra_options: dict[str, str] | None = None
) -> "onnxruntime.InferenceSession":
    """Return a session on CUDA, or raise DeviceError. `extra_options` are for the CUDA provider."""
    if not cuda_libraries.has_driver() and (error := cuda_libraries.availability_error()):
        raise error
    cuda_libraries.preload()
    options = {
        **_cuda_options(index),
        "enable_cuda_graph": "1",  # for the runs that request it; see `io_binding`
        **(extra_options or {}),
    }
    return _require_provider(path, Device("cuda", index), [(_CUDA, options)], cuda_libraries.availability_error)


def _tensorrt_session(path: Path | bytes, index: int, spec: ModelSpec | None) -> "onnxruntime.InferenceSession":
    """Return a session on TensorRT, or raise DeviceError. CUDA runs the operators that TensorRT does not support.

    This builds an engine for a range of batch sizes, which takes tens of seconds, or loads it from the cache.
    """
    from cifarx_serve.backends.onnxruntime import tensorrt_engines, tensorrt_libraries

    if not cuda_libraries.has_driver() and (error := tensorrt_libraries.availability_error()):
        raise error
    tensorrt_libraries.preload()
    shapes = _engine_shapes(spec)
    options = {
        "device_id": str(index),
        "trt_fp16_enable": "1" if spec and spec.precision == "fp16" else "0",
        "trt_cuda_graph_enable": "0",  # it would need IO binding, and captures only one shape
        **shapes,
    }
    # Without shapes, an engine is built for the first batch and again for each new size, so it is not worth caching.
    cache: AbstractContextManager[dict[str, str]] = (
        tensorrt_engines.engine_cache(path) if shapes and isinstance(path, Path) else nullcontext({})
    )
    with cache as cache_options:
        providers = [(_TENSORRT, {**options, **cache_options}), (_CUDA, _cuda_options(index))]
        return _require_provider(path, Device("tensorrt", index), providers, tensorrt_libraries.availability_error)


def _engine_shapes(spec: ModelSpec | None) -> dict[str, str]:
    """Return the options for the batch sizes of the engine, or none if TensorRT runs only parts of the graph.

    It runs parts of an int8 model, because of its unsigned activations, and of a model with embedded preprocessing.
    ONNX Runtime would then also require the shapes between these parts.
    """
    if spec is None or spec.precision == "int8" or spec.embedded_preprocessing:
        return {}
    image = f"{spec.input.channels}x{spec.input.height}x{spec.input.width}"
    return {
        f"trt_profile_{name}_shapes": f"input:{batch_size}x{image}"
        for name, batch_size in zip(("min", "opt", "max"), _ENGINE_BATCH_SIZES, strict=True)
    }


def _cuda_options(index: int) -> dict[str, str]:
    return {
        "device_id": str(index),
        "use_tf32": "0",  # enabled by default, with errors a thousand times the tolerance of fp32
        "cudnn_conv_algo_search": "HEURISTIC",  # the default measures every algorithm for each new batch size
    }


def _require_provider(
    path: Path | bytes,
    device: Device,
    providers: list[tuple[str, dict[str, str]]],
    availability_error: Callable[[], DeviceError | None],
) -> "onnxruntime.InferenceSession":
    """Return a session on the first provider, or raise DeviceError.

    The library itself would fall back to another provider and only log it.
    """
    try:
        session = _create_session(path, providers, {"session.disable_cpu_ep_fallback": "1"})
    except ModelFileError as error:
        raise availability_error() or DeviceError(
            f"ONNX Runtime cannot use {device} ({error.problem})", "run `cifarx doctor`"
        ) from error
    if (provider := session.get_providers()[0]) != providers[0][0]:
        raise availability_error() or DeviceError(
            f"{device} was requested, but ONNX Runtime uses {provider}", "run `cifarx doctor`"
        )
    return session


def _create_session(
    model: Path | bytes,
    providers: list[tuple[str, dict[str, str]]],
    config: dict[str, str] | None = None,
    threads: int | None = None,
) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    if (cpus := threads or available_cpus()) != os.cpu_count():
        options.intra_op_num_threads = cpus  # an explicit count disables the pinning of threads to cores
    spinning = {_ALLOW_SPINNING: "0"} if has_cpu_limit() else {}
    for key, value in {_MAX_FOLDED_SIZE: str(_max_folded_size(model)), **spinning, **(config or {})}.items():
        options.add_session_config_entry(key, value)
    try:
        # With enable_fallback=1, the library would print to standard output and continue on the CPU.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # the library's exceptions have no common base class
        path = model if isinstance(model, Path) else "the test model"
        raise ModelFileError(f"{path} is not a valid ONNX model ({error_message(error)})", "export it again") from error


def _max_folded_size(model: Path | bytes) -> int:
    """Return the maximum bytes of a folded constant: all weights of the file from 8 to 32 bits, and some more."""
    return (1 << 20) + 4 * (model.stat().st_size if isinstance(model, Path) else len(model))
