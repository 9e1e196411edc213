"""Run ONNX files with tract, a runtime in Rust."""

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import TensorInfo
from cifarx_serve.backends.other_runtimes.onnx_file import OnnxFileBackend

_DTYPES: Final = {"f32": "float32", "f16": "float16", "u8": "uint8"}


class TractBackend(OnnxFileBackend):
    """A model of tract, which runs on one thread."""

    name = "tract"
    library = "tract"

    def open_library(self, path: Path) -> str:
        from importlib.metadata import version

        import tract

        self._model: Any = tract.onnx().load(path).into_model().into_runnable()
        return f"tract {version('tract')}"

    def infer(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        outputs: NDArray[np.float32] = self._model.run([np.ascontiguousarray(batch)])[0].to_numpy()
        return outputs

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        return (
            _tensor_info("input", str(self._model.input_fact(0))),
            _tensor_info(self.spec.output, str(self._model.output_fact(0))),
        )

    def close(self) -> None:
        self._model = None


def _tensor_info(name: str, fact: str) -> TensorInfo:
    """Return a tensor as tract describes it, such as `batch,3,32,32,f32`."""
    *shape, kind = fact.split(",")
    sizes = tuple(int(size) if re.fullmatch(r"\d+", size) else size for size in shape)
    return TensorInfo(name, _DTYPES.get(kind, kind), sizes)
