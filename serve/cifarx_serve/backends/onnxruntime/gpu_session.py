"""Run an ONNX model on CUDA or TensorRT: one thread makes all calls of its sessions."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.onnxruntime.io_binding import BoundSession, TimedSession, run_options
from cifarx_serve.backends.onnxruntime.out_of_memory import memory_error
from cifarx_serve.backends.onnxruntime.session import create_session, release_numbers
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, FallbackWarning, ModelFileError, error_message
from cifarx_serve.spec import ModelSpec

if TYPE_CHECKING:
    import onnxruntime

_CUDA: Final = "CUDAExecutionProvider"
_TENSORRT: Final = "TensorrtExecutionProvider"
_CPU: Final = "CPUExecutionProvider"

_ENGINE_BATCH_SIZES: Final = (1, 8, 64)
"""The minimum, optimal and maximum batch size of a TensorRT engine. Its kernels are chosen for the optimal one."""

_GRAPHS_SINCE: Final = (1, 30)
"""Older versions of ONNX Runtime reuse host memory that a captured graph reads in each replay, as for a Concat."""

_CONFIG: Final = {
    # Weights and biases of int8 models are dequantized once, when the session is created. A GPU runs these layers in
    # floating point either way, and has no kernel that dequantizes the int32 of a bias.
    "session.disable_quant_qdq": "1",
    "session.record_ep_graph_assignment_info": "1",  # which execution provider runs which node
}

_SHAPE_OPERATORS: Final = frozenset({
    "Abs", "Add", "And", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range",
    "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub",
    "Tile", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
"""The operators that compute shapes, such as the batch size times the number of heads. ONNX Runtime runs this
arithmetic on the CPU, because the host needs its results."""

P = ParamSpec("P")
T = TypeVar("T")


class GpuSession:
    """A session on CUDA or TensorRT. One lasting thread creates it, makes all of its calls and closes it.

    ONNX Runtime keeps handles of cuBLAS and cuDNN, and captured CUDA graphs, for each thread that calls a session.
    Another thread would capture all graphs again, and what belongs to a thread that ended is not released.

    Args:
        path: the model file.
        device: a CUDA or TensorRT device.
        spec: the model spec in the file.

    Attributes:
        device: the device.

    Raises:
        DeviceError: the device is not available, or cannot run the whole model.
        DeviceMemoryError: the device does not have enough memory for the model.
    """

    def __init__(self, path: Path, device: Device, spec: ModelSpec) -> None:
        self._path = path
        self._spec = spec
        self.device = device
        self._thread = ThreadPoolExecutor(1, "onnxruntime")
        self._session: Any = None
        self._bound: BoundSession | None = None
        try:
            self._session = self._call(open_session, path, device, spec)
            self._provider: str = self._session.get_providers()[0]
            problem = self._call(self._bind, spec) if self._provider == _CUDA else None
            if problem is not None:
                warnings.warn(f"running {path} without CUDA graphs: {problem}", FallbackWarning, stacklevel=3)
        except BaseException:
            self.close()
            raise

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Return the output, float32 (N, output_size). The library's exceptions have no common base class."""
        return self._call(self._run, batch)

    def get_providers(self) -> list[str]:
        """Return the execution providers of the session, the preferred one first."""
        providers: list[str] = self._session.get_providers()
        return providers

    def get_inputs(self) -> list[Any]:
        """Return the library's descriptions of the inputs."""
        inputs: list[Any] = self._session.get_inputs()
        return inputs

    def get_outputs(self) -> list[Any]:
        """Return the library's descriptions of the outputs."""
        outputs: list[Any] = self._session.get_outputs()
        return outputs

    def device_time(self, batch: NDArray[Any]) -> float | None:
        """Return the time of a run in microseconds, on CUDA only.

        It is measured in a second session on the same file, because ONNX Runtime does not expose the stream of the
        first one. If that fails, for example for lack of memory, the result is None with a FallbackWarning.
        """
        if self._bound is None:
            return None
        try:
            return self._call(self._device_time, batch)
        except Exception as error:  # the library's exceptions have no common base class
            message = f"cannot measure the device time of {self._path}: {error_message(error)}"
            warnings.warn(message, FallbackWarning, stacklevel=3)
            return None

    def close(self) -> None:
        """Release the sessions and end the thread. Calling it twice is safe."""
        if self._session is not None:
            self._call(self._release)
        self._thread.shutdown()

    def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.submit(function, *args, **kwargs).result()

    def _run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        limit = _ENGINE_BATCH_SIZES[-1]
        if self._provider == _TENSORRT and len(batch) > limit:
            return np.concatenate([self._run(batch[start : start + limit]) for start in range(0, len(batch), limit)])
        if self._bound is not None and len(batch) <= self._bound.max_batch_size:
            return self._bound.run(batch)
        options = run_options() if self._provider == _CUDA else None
        outputs: NDArray[np.float32] = self._session.run([self._spec.output], {"input": batch}, options)[0]
        return outputs

    def _bind(self, spec: ModelSpec) -> str | None:
        """Use IO binding and CUDA graphs, or return the reason why they do not work."""
        import onnxruntime

        if release_numbers(onnxruntime.__version__) < _GRAPHS_SINCE:
            needed = ".".join(map(str, _GRAPHS_SINCE))
            return f"they need ONNX Runtime {needed}, and {onnxruntime.__version__} is installed"
        if self._session.get_provider_options()[_CUDA]["enable_cuda_graph"] != "1":
            return "ONNX Runtime does not support them for this model"
        if spec.embedded_preprocessing:
            return "its images can have any size"
        bound = BoundSession(self._session, "cuda", self.device.index, spec)
        try:
            problem = bound.find_mismatch()
        except Exception as error:  # the library's exceptions have no common base class
            problem = error_message(error)
        if problem is None:
            self._bound = bound
        return problem

    def _device_time(self, batch: NDArray[Any]) -> float | None:
        return self._timed.device_time(batch) if self._timed else None

    @cached_property
    def _timed(self) -> TimedSession | None:
        assert self._bound is not None, "only a session on CUDA can be timed"
        from cifarx_serve.backends.onnxruntime.cuda_timer import open_cuda_timer

        index = self.device.index
        if (timer := open_cuda_timer(index)) is None:
            return None
        try:
            session = _open_cuda_session(self._path, index, {"user_compute_stream": str(timer.stream)})
        except BaseException:
            timer.close()
            raise
        return TimedSession(self._bound.with_session(session), timer)

    def _release(self) -> None:
        if timed := self.__dict__.pop("_timed", None):
            timed.close()
        self._bound = None
        self._session = None


def open_session(path: Path | bytes, device: Device, spec: ModelSpec | None = None) -> "onnxruntime.InferenceSession":
    """Return a session on CUDA or TensorRT, for the calls of one thread.

    Args:
        path: the model file, or the bytes of a model without a spec.
        device: a CUDA or TensorRT device.
        spec: the model spec in the file.

    Raises:
        DeviceError: the device is not available, or cannot run the whole model.
        DeviceMemoryError: the device does not have enough memory for the model.
    """
    if device.type == "tensorrt":
        return _open_tensorrt_session(path, device.index, spec)
    return _open_cuda_session(path, device.index)


def _open_cuda_session(
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


def _open_tensorrt_session(path: Path | bytes, index: int, spec: ModelSpec | None) -> "onnxruntime.InferenceSession":
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
    image = "x".join(map(str, spec.input.shape))
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

    The library itself would fall back to another provider, for the model or for parts of it, and only log it.
    """
    try:
        session = _create_session(path, providers)
    except ModelFileError as error:
        raise (
            memory_error(error, device)
            or availability_error()
            or DeviceError(f"ONNX Runtime cannot use {device} ({error.problem})", "run `cifarx doctor`")
        ) from error
    if (provider := session.get_providers()[0]) != providers[0][0]:
        raise availability_error() or DeviceError(
            f"{device} was requested, but ONNX Runtime uses {provider}", "run `cifarx doctor`"
        )
    if operators := _compute_operators_on_cpu(session):
        name = path if isinstance(path, Path) else "the test model"
        raise DeviceError(
            f"{device} cannot run all of {name}: ONNX Runtime has only CPU kernels for {', '.join(operators)}",
            "use --device cpu",
        )
    return session


def _create_session(path: Path | bytes, providers: list[tuple[str, dict[str, str]]]) -> "onnxruntime.InferenceSession":
    """Create a session. If it cannot capture CUDA graphs, as for a model with control flow, create one without them."""
    name, options = providers[0]
    try:
        return create_session(path, providers, _CONFIG)
    except ModelFileError:
        if options.get("enable_cuda_graph") != "1":
            raise
        return create_session(path, [(name, {**options, "enable_cuda_graph": "0"})], _CONFIG)


def _compute_operators_on_cpu(session: "onnxruntime.InferenceSession") -> list[str]:
    """Return the operators of the session that run on the CPU and compute more than shapes, sorted."""
    parts = session.get_provider_graph_assignment_info()
    placed = {node.op_type for part in parts if part.ep_name == _CPU for node in part.get_nodes()}
    return sorted(placed - _SHAPE_OPERATORS)
