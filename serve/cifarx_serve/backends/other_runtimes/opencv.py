"""Run ONNX files with the module `dnn` of OpenCV."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.other_runtimes.onnx_file import OnnxFileBackend
from cifarx_serve.errors import error_message
from cifarx_serve.system.cpus import available_cpus


class OpenCvBackend(OnnxFileBackend):
    """A network of OpenCV. It describes no tensors, and its threads are those of the process."""

    name = "opencv"
    library = "OpenCV"

    def open_library(self, path: Path) -> str:
        import cv2

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are raised as exceptions too
        cv2.setNumThreads(available_cpus())
        self._network: Any = cv2.dnn.readNetFromONNX(np.fromfile(path, np.uint8))
        return f"OpenCV {cv2.__version__} dnn"

    def infer(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        self._network.setInput(batch)
        outputs: NDArray[np.float32] = self._network.forward().copy()  # the next run would overwrite it
        return outputs

    def describe_error(self, error: Exception) -> str:
        """Return the message without the place in the source code of OpenCV."""
        return error_message(Exception(getattr(error, "err", "") or str(error)))

    def close(self) -> None:
        self._network = None
