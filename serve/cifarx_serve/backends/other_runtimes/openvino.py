"""Run ONNX files with OpenVINO."""

from pathlib import Path
from typing import TYPE_CHECKING

from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.backends.openvino import OpenVinoBackend, read_graph
from cifarx_serve.spec import ModelSpec, Precision

if TYPE_CHECKING:
    import openvino


class OpenVinoOnnxBackend(OpenVinoBackend):
    """An ONNX file that OpenVINO compiled for the CPU. It computes in float32, whatever the file contains."""

    suffixes = ()

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        return OnnxRuntimeBackend.read_spec(path)

    @property
    def computed_precision(self) -> Precision:
        return "fp32"

    @classmethod
    def read_model(cls, path: Path) -> "tuple[openvino.Core, openvino.Model]":
        """Read the model with OpenVINO's own reader of ONNX."""
        return read_graph(path, path.read_bytes())
