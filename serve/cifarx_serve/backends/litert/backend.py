"""Run LiteRT files, `.tflite`: a FlatBuffer with the model, and after it the spec, which LiteRT ignores."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend, TensorInfo, parse_spec, require_file
from cifarx_serve.backends.litert.graph import UnsafeGraphError, check_graph
from cifarx_serve.devices import Device, out_of_memory_error
from cifarx_serve.errors import DeviceError, ModelFileError, UsageError, error_message
from cifarx_serve.files.trailing_document import read_document
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import available_cpus

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

_STANDARD_ERROR: Final = 2
_NOTE: Final = b"INFO: "

_standard_error = threading.Lock()


class LiteRtBackend(Backend):
    """A model that LiteRT runs on the CPU, image by image.

    The size of the batch is fixed in a LiteRT model, and many models compute something else after it is changed. So the
    model in the file takes one image, and a batch of any size is run in a loop. An interpreter belongs to one thread at
    a time, so each of several runs at once has its own.
    """

    name = "litert"
    suffixes = (".tflite",)

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        if device.type not in ("auto", "cpu"):
            raise DeviceError(f"{path} runs on the CPU, but {device.type} was requested", "use --device cpu")
        self._path = path
        self._content = path.read_bytes()
        try:
            self._input, self._output = check_graph(self._content)
        except UnsafeGraphError as error:
            raise _invalid_file(path, error) from error
        self._threads = available_cpus()
        self._idle = [self._open()]
        self.provider = "LiteRT CPU"

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without LiteRT, because it follows the model."""
        require_file(path)
        return parse_spec(read_document(path), path)

    def _open(self) -> "Interpreter":
        """Return an interpreter of the model.

        Raises:
            UsageError: LiteRT is not installed.
            ModelFileError: LiteRT cannot run the model.
        """
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ModuleNotFoundError as error:
            raise UsageError("LiteRT is not installed", 'pip install "cifarx[litert]"') from error
        try:
            with _without_notes():
                interpreter = Interpreter(model_content=self._content, num_threads=self._threads)
                interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise _invalid_file(self._path, error) from error
        return interpreter

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        interpreter = self._take_interpreter()
        outputs = []
        try:
            for image in batch:
                interpreter.set_tensor(self._input.position, image[None])
                interpreter.invoke()
                outputs.append(interpreter.get_tensor(self._output.position))
        except MemoryError as error:
            raise out_of_memory_error("cpu", len(batch), None, None) from error
        except (RuntimeError, ValueError) as error:
            problem = f"{self._path} cannot run on {batch.dtype} {batch.shape} ({error_message(error)})"
            raise ModelFileError(problem, "export it again") from error
        finally:
            self._idle.append(interpreter)
        return np.concatenate(outputs)

    def _take_interpreter(self) -> "Interpreter":
        try:
            return self._idle.pop()
        except IndexError:  # all are in use
            return self._open()

    def single_threaded(self) -> Backend:
        """Return a backend whose interpreters have one thread each."""
        other = LiteRtBackend.__new__(LiteRtBackend)
        other.__dict__.update(self.__dict__, _threads=1, _idle=[])
        other._idle.append(other._open())
        return other

    @property
    def runs_on_own_cpus(self) -> bool:
        return True

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(tensor.name, tensor.dtype, ("batch", *tensor.shape[1:]))
            for tensor in (self._input, self._output)
        )

    def close(self) -> None:
        self._idle.clear()
        self._content = b""


@contextmanager
def _without_notes() -> Iterator[None]:
    """Leave out what LiteRT notes on standard error, such as the delegate that it uses. All else is passed on."""
    with _standard_error, tempfile.TemporaryFile() as written:
        try:
            original = os.dup(_STANDARD_ERROR)
        except OSError:  # it is closed
            yield
            return
        os.dup2(written.fileno(), _STANDARD_ERROR)
        try:
            yield
        finally:
            os.dup2(original, _STANDARD_ERROR)
            os.close(original)
            written.seek(0)
            for line in written:
                if not line.startswith(_NOTE):
                    os.write(_STANDARD_ERROR, line)


def _invalid_file(path: Path, error: Exception) -> ModelFileError:
    return ModelFileError(f"{path} is not a model that LiteRT runs ({error_message(error)})", "export it again")
