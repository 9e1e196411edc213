"""Run ExecuTorch programs, `.pte`: the graph of a network lowered to XNNPACK, and the spec after its end.

ExecuTorch's own tools open the file as it is. Its Python runtime needs PyTorch's libraries.
"""

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend, TensorInfo, parse_spec, require_file
from cifarx_serve.backends.torch.executorch_program import METHOD, read_program
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, UsageError, error_message
from cifarx_serve.files.trailing_document import read_document
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import available_cpus

_DTYPES: Final = {0: "uint8", 6: "float32"}
"""Names of the scalar types of `runtime/core/portable_type/scalar_type.h` that a classifier takes or returns."""

_LOG_LINE: Final = re.compile(r"^\[\w+\.\w+:\d+\] (.*)$", re.MULTILINE)
_LOG_LOCK: Final = threading.Lock()


class ExecuTorchBackend(Backend):
    """A program on the CPU.

    A program has memory for a number of images that its export chose. A larger batch is run in parts.
    """

    name = "executorch"

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        if device.type not in ("auto", "cpu"):
            raise DeviceError(f"{path} runs on the CPU, but {device.type} was requested", "use --device cpu")
        content = read_program(path)
        runtime = load_runtime()
        import torch

        self._torch = torch
        with captured_log() as log:
            try:
                # Opened from its file, which the program reads as long as it exists. The method does not keep it alive.
                verification = runtime.Verification.InternalConsistency
                self._program = runtime._load_program(str(path), program_verification=verification)
                self._method = self._program.load_method(METHOD)
                meta = self._method.method_meta()
                tensors = [meta.input_tensor_meta(index) for index in range(meta.num_inputs())]
                tensors += [meta.output_tensor_meta(index) for index in range(meta.num_outputs())]
            except (RuntimeError, IndexError, MemoryError) as error:
                problem = f"{path} is not a program that ExecuTorch runs ({log_reason(log, error)})"
                raise ModelFileError(problem, "export it again") from error
        if len(tensors) != 2 or not all(tensor.sizes() and tensor.sizes()[0] for tensor in tensors):
            raise ModelFileError(f"{path} does not have one input and one output", "export it again")
        self._path = path
        self._infos = tuple(map(_describe, ("input", self.spec.output), tensors))
        self.max_batch_size: int = tensors[0].sizes()[0]
        self.provider = "ExecuTorch XNNPACK" if content.delegates else "ExecuTorch"

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without ExecuTorch and PyTorch."""
        require_file(path)
        return parse_spec(read_document(path), path)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Run a batch. The runtime holds Python's lock, so runs in several threads follow one another."""
        info = self._infos[0]
        if (batch.dtype.name, *batch.shape[1:]) != (info.dtype, *info.shape[1:]):  # the runtime would not say why
            shape = ", ".join(map(str, info.shape))
            problem = f"{self._path} takes {info.dtype} ({shape}), not {batch.dtype} {batch.shape}"
            raise ModelFileError(problem, "give a batch of the size in its spec")
        images = np.ascontiguousarray(batch)
        size = self.max_batch_size
        parts = [self._run(images[start : start + size]) for start in range(0, len(images), size)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        try:
            (outputs,) = self._method.call([self._torch.from_numpy(images)])
        except RuntimeError as error:
            problem = f"{self._path} cannot run on {images.dtype} {images.shape} ({error_message(error)})"
            raise ModelFileError(problem, "export it again") from error
        array: NDArray[np.float32] = outputs.numpy()
        return array

    @property
    def runs_on_own_cpus(self) -> bool:
        return True

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        return self._infos

    def close(self) -> None:
        self._method = self._program = None


def _describe(name: str, tensor: Any) -> TensorInfo:
    return TensorInfo(name, _DTYPES.get(tensor.dtype(), "another type"), ("batch", *tensor.sizes()[1:]))


@cache
def load_runtime() -> Any:
    """Return ExecuTorch's runtime, with as many threads as there are CPUs that this process may use.

    They are set here, once, because the open programs keep a pointer to the threads.

    Raises:
        UsageError: ExecuTorch or PyTorch is not installed.
    """
    try:
        import torch  # noqa: F401  the runtime needs its libraries to be loaded

        # Not through `executorch.runtime`, which imports the whole exporter and takes seconds.
        from executorch.extension.pybindings import _C
    except ModuleNotFoundError as error:
        raise UsageError("ExecuTorch is not installed", 'pip install "cifarx[executorch]"') from error
    except ImportError as error:
        problem = f"ExecuTorch does not work with the installed PyTorch ({error_message(error)})"
        raise UsageError(problem, 'pip install --upgrade "cifarx[executorch]"') from error
    with captured_log():  # it reports what it finds out about the CPU
        if _C._threadpool_get_thread_count() != (threads := available_cpus()):
            _C._unsafe_reset_threadpool(threads)
    return _C


@contextmanager
def captured_log() -> Iterator[io.StringIO]:
    """Keep what the runtime writes to standard error, such as its reasons. One thread at a time can do so."""
    with _LOG_LOCK, redirect_stderr(io.StringIO()) as log:
        yield log


def log_reason(log: io.StringIO, error: Exception) -> str:
    """Return the reason of an error: the first that the runtime wrote, which the errors after it follow from."""
    written = _LOG_LINE.search(log.getvalue())
    return written[1] if written else error_message(error)
