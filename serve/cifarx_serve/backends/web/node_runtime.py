"""A Node.js process that runs one model with ONNX Runtime Web. `runner.mjs` is the other side, and has the protocol.

The model is compiled to no machine code of its own: it runs in WebAssembly, which has its own memory and no access to
files. The scripts are those of the installed package.
"""

import shutil
import threading
import weakref
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.web.node_package import NodePackage
from cifarx_serve.errors import UsageError
from cifarx_serve.system.worker_process import WorkerExited, WorkerProcess

_RUNNER: Final = Path(__file__).with_name("runner.mjs")

RESULT_TIMEOUT_S: Final = 600
"""How long a model may take for a batch. The largest that a browser can load take a minute for 64 images."""


class TensorDescription(msgspec.Struct):
    """An input or output, as ONNX Runtime Web describes it."""

    name: str
    type: str = ""
    shape: tuple[int | str, ...] = ()


class RuntimeDescription(msgspec.Struct):
    """The reply to an opened model.

    Attributes:
        version: the version of ONNX Runtime Web.
        node: the version of Node.js, such as "v22.1.0".
        inputs, outputs: the tensors of the model.
    """

    version: str
    node: str
    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]


class _Reply(msgspec.Struct):
    bytes: int = 0
    error: str | None = None
    dtype: str = ""
    shape: tuple[int, ...] = ()


class NodeError(Exception):
    """Raised when ONNX Runtime Web or Node.js reports an error, which is the message, or when the process ends."""


class NodeRuntime:
    """A model that is open in a Node.js process. Only one thread at a time waits for a result.

    Args:
        package: the installed ONNX Runtime Web.
        model: the content of an ONNX file.
        timeout_s: how long a run may take before the process is ended.

    Raises:
        UsageError: Node.js is not installed.
        NodeError: the model cannot be opened.
    """

    def __init__(self, package: NodePackage, model: bytes, timeout_s: float = RESULT_TIMEOUT_S) -> None:
        node = shutil.which("node")
        if node is None:
            raise UsageError("Node.js is not installed", "install it, so that `node` is on the PATH")
        self._lock = threading.Lock()
        self._process = WorkerProcess(
            [node, str(_RUNNER), str(package.script), str(package.wasm), str(timeout_s)], silent=True
        )
        # Also where the owner forgets it: the process would otherwise live as long as this one.
        self._end = weakref.finalize(self, self._process.kill)
        try:
            line, _ = self._request({"open": True}, memoryview(model))
        except NodeError:
            self.close()
            raise
        self.description = msgspec.json.decode(line, type=RuntimeDescription)

    def run(self, batch: NDArray[Any], output: str) -> NDArray[Any]:
        """Return an output of the model for a batch of its only input, which is called `input`.

        Raises:
            NodeError: the model cannot run on the batch, or does not end, or the process has ended.
        """
        batch = np.ascontiguousarray(batch)
        header = {"run": output, "dtype": batch.dtype.name, "shape": batch.shape}
        line, content = self._request(header, batch.data.cast("B"))
        reply = msgspec.json.decode(line, type=_Reply)
        try:
            return np.frombuffer(content, reply.dtype).reshape(reply.shape).copy()
        except (TypeError, ValueError) as error:
            raise NodeError(f"it returns {reply.dtype} {reply.shape} in {len(content):,} bytes") from error

    def _request(self, header: dict[str, Any], content: memoryview) -> tuple[bytes, bytes]:
        """Send a request, and return the line and the content of its reply."""
        line = msgspec.json.encode({**header, "bytes": content.nbytes})
        try:
            with self._lock:
                self._process.send(line, content)
                answer = self._process.readline()
                reply = msgspec.json.decode(answer, type=_Reply)
                result = self._process.read(reply.bytes)
        except WorkerExited as error:
            raise NodeError(f"Node.js ended with status {error.status}") from error
        except msgspec.MsgspecError as error:
            self.close()
            raise NodeError(f"the reply of Node.js cannot be read ({error})") from error
        except ValueError as error:  # the pipes were closed
            raise NodeError("Node.js was closed") from error
        except BaseException:  # an interrupt: the next request would get the reply to this one
            self.close()
            raise
        if reply.error is not None:
            raise NodeError(reply.error)
        return answer, result

    def close(self) -> None:
        """End the process. Calling it twice is safe."""
        self._end()
