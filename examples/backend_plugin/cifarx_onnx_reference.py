"""A backend that runs `.onnx` files with ONNX's reference implementation, written in numpy.

It follows the ONNX specification and optimizes nothing, so it is slow. It helps to find where an artifact and its
checkpoint start to differ: if the file gives the same wrong answer here as in ONNX Runtime, the conversion is wrong.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend, TensorInfo
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, error_message
from cifarx_serve.spec import ModelSpec


class OnnxReferenceBackend(Backend):
    """An ONNX file in `onnx.reference.ReferenceEvaluator`. It runs on the CPU."""

    name = "onnx_reference"
    suffixes = (".onnx",)

    def __init__(self, path: Path, device: Device) -> None:
        import onnx  # imported here, because listing the backends imports this module
        from onnx.reference import ReferenceEvaluator

        if device.type not in ("auto", "cpu"):
            raise DeviceError(f"backend {self.name} does not support device {device}", "use --device cpu")
        self.spec = self.read_spec(path)
        self.provider = f"onnx {onnx.__version__}"
        self._path = path
        try:
            model = onnx.load(path)
            self._evaluator: Any = ReferenceEvaluator(model)
        except Exception as error:  # the library's exceptions have no common base class
            raise ModelFileError(
                f"{path} cannot be opened with onnx ({error_message(error)})", "export it again"
            ) from error
        self._graph = model.graph

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        # Also checks that the file is safe to open. A format of your own stores the spec in a way of its own, and
        # returns `parse_spec(document, path)`, from `cifarx_serve.backends.base`.
        return OnnxRuntimeBackend.read_spec(path)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        try:
            logits: NDArray[np.float32] = self._evaluator.run(["logits"], {"input": batch})[0]
        except Exception as error:  # operators raise any exception
            problem = f"{self._path} cannot run on {batch.dtype} {batch.shape} ({error_message(error)})"
            raise ModelFileError(problem, "export it again") from error
        return logits

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        from onnx.helper import tensor_dtype_to_np_dtype

        tensors = [(value.name, value.type.tensor_type) for value in [*self._graph.input, *self._graph.output]]
        return tuple(
            TensorInfo(
                name,
                str(tensor_dtype_to_np_dtype(tensor.elem_type)),
                tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim),
            )
            for name, tensor in tensors
        )

    def close(self) -> None:
        self._evaluator = None
