"""Run `.onnx` files with ONNX Runtime, on the CPU, CUDA or TensorRT. This backend does not need PyTorch."""

import copy
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.base import Backend, TensorInfo, parse_spec, require_file
from cifarx_serve.backends.onnxruntime.model_reader import read_model_info
from cifarx_serve.backends.onnxruntime.session import CPU, create_session, release_numbers
from cifarx_serve.devices import Device
from cifarx_serve.errors import (
    CifarxError,
    DeviceError,
    DeviceMemoryError,
    FallbackWarning,
    ModelFileError,
    error_message,
)
from cifarx_serve.spec import ModelSpec

if TYPE_CHECKING:
    from cifarx_serve.backends.onnxruntime.gpu_session import GpuSession

SPEC_KEY: Final = "cifarx.spec"
"""The key of the model spec in the `metadata_props` of an ONNX file."""

# y = Identity(x), x float32 of any length, opset 13: the smallest model that can test an execution provider.
_TEST_MODEL: Final = bytes.fromhex(
    "08083a390a100a017812017922084964656e746974791201675a100a0178120b0a09080112050a0312016e"
    "62100a0179120b0a09080112050a0312016e42040a00100d"
)

_DTYPES: Final = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session. `provider` is the first execution provider that the session reports.

    The bytes of a file are checked before the library opens it; see `model_reader`.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        _require_runtime(self.spec, path)
        self._path = path
        self._gpu = _open_gpu_session(path, device, self.spec)
        self._session: Any = self._gpu or create_session(path, CPU)
        self.provider = self._session.get_providers()[0]

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without creating a session. Memory and time do not grow with the weights."""
        require_file(path)
        return parse_spec(read_model_info(path).metadata.get(SPEC_KEY.encode()), path)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        try:
            if self._gpu is not None:
                return self._gpu.run(batch)
            outputs: NDArray[np.float32] = self._session.run([self.spec.output], {"input": batch})[0]
        except CifarxError:
            raise
        except Exception as error:  # the library's exceptions have no common base class
            raise self._run_error(error, batch) from error
        return outputs

    def _run_error(self, error: Exception, batch: NDArray[Any]) -> CifarxError:
        from cifarx_serve.backends.onnxruntime.out_of_memory import memory_error

        problem = f"{self._path} cannot run on {batch.dtype} {batch.shape} ({error_message(error)})"
        device = self._gpu.device if self._gpu else Device("cpu")
        return memory_error(error, device, len(batch)) or ModelFileError(problem, "export it again")

    def single_threaded(self) -> Backend:
        """Return a backend with a second session on the same file, which starts no threads."""
        if self._gpu is not None:
            return self
        other = copy.copy(self)
        other._session = create_session(self._path, CPU, threads=1)
        return other

    @property
    def runs_on_own_cpus(self) -> bool:
        return self.provider == "CPUExecutionProvider"

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(tensor.name, _DTYPES.get(tensor.type, tensor.type), tuple(tensor.shape))
            for tensor in [*self._session.get_inputs(), *self._session.get_outputs()]
        )

    def device_time(self, batch: NDArray[Any]) -> float | None:
        """Return the time of a run in microseconds, on CUDA only. See `GpuSession.device_time`."""
        return self._gpu.device_time(batch) if self._gpu else None

    def close(self) -> None:
        if self._gpu is not None:
            self._gpu.close()
        self._session = None


def provider_error(device: Device) -> CifarxError | None:
    """Return why ONNX Runtime cannot run on a device, or None. This runs a small model on the device."""
    try:
        _require_supported(device)
        if device.type == "cpu":
            session, options = create_session(_TEST_MODEL, CPU), None
        else:
            from cifarx_serve.backends.onnxruntime import gpu_session, io_binding

            session, options = gpu_session.open_session(_TEST_MODEL, device), io_binding.run_options()
    except (DeviceError, DeviceMemoryError) as error:
        return error
    try:
        session.run(None, {"x": np.zeros(1, np.float32)}, options)
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
    if release_numbers(required) > release_numbers(installed):
        raise ModelFileError(
            f"{path} requires ONNX Runtime >= {required}, but {installed} is installed",
            f'pip install "onnxruntime>={required}"',
        )


def _open_gpu_session(path: Path, device: Device, spec: ModelSpec) -> "GpuSession | None":
    """Return a session on a GPU, or None for the CPU.

    Raises:
        DeviceError: the device was requested by name and is not available, or cannot run the whole model.
        DeviceMemoryError: the device was requested by name and does not have enough memory.
    """
    _require_supported(device)
    if device.type == "cpu" or (device.type == "auto" and not cuda_libraries.has_driver()):
        return None
    from cifarx_serve.backends.onnxruntime.gpu_session import GpuSession

    if device.type != "auto":
        return GpuSession(path, device, spec)
    try:
        return GpuSession(path, Device("cuda", device.index), spec)
    except (DeviceError, DeviceMemoryError) as error:
        warnings.warn(f"running on the CPU: {error}", FallbackWarning, stacklevel=3)
        return None


def _require_supported(device: Device) -> None:
    if device.type == "mps":
        raise DeviceError("ONNX Runtime does not support device mps", "use --device cpu, or a PyTorch backend")
    if device.type in ("gpu", "npu"):
        raise DeviceError(
            f"ONNX Runtime does not support device {device}, which is Intel's", "use --device cuda, or an OpenVINO file"
        )
