"""Write a LiteRT model as the same bytes every time, with the names of its spec and none of this machine.

It needs the package ai-edge-litert, and is imported only by the programs that run in a process of their own.
"""

from typing import Any, Final

import flatbuffers
import numpy as np
from ai_edge_litert.schema_py_generated import BuiltinOperator
from ai_edge_litert.tools import flatbuffer_utils
from numpy.typing import NDArray

_IDENTIFIER: Final = b"TFL3"
_ALIGNMENT: Final = 16
"""The alignment of weights that LiteRT's schema asks for, in bytes. The package's own writer does not align them."""

_MIN_RUNTIME: Final = b"min_runtime_version"
SIGNATURE: Final = "serving_default"
INPUT: Final = "input"

_OPERATORS: Final = {value: name for name, value in vars(BuiltinOperator).items() if not name.startswith("_")}


class _AlignedBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """Aligns the vectors of NumPy arrays, which are the weights."""

    def CreateNumpyVector(self, x: NDArray[Any]) -> int:  # noqa: N802  the name of the base class
        self.StartVector(x.itemsize, x.size, _ALIGNMENT)
        content = x.tobytes()
        self.head = int(self.Head()) - len(content)
        self.Bytes[self.Head() : self.Head() + len(content)] = content
        self.vectorNumElems = x.size
        return int(self.EndVector())


def rewrite(content: bytes, output: str) -> bytes:
    """Return a model with all weights inside the FlatBuffer, and with tensors named by their operators.

    Args:
        content: a model with one graph and one signature.
        output: the name of its output.
    """
    model = flatbuffer_utils.read_model_from_bytearray(content)
    model.description = b"cifarx"
    model.metadata = [entry for entry in model.metadata or [] if entry.name == _MIN_RUNTIME]
    for graph in model.subgraphs:
        _name_tensors(graph, model, output)
    for signature in model.signatureDefs:
        signature.signatureKey = SIGNATURE
        signature.inputs[0].name, signature.outputs[0].name = INPUT, output
    for buffer in model.buffers:
        if buffer.data is not None:
            buffer.data = np.frombuffer(bytes(buffer.data), np.uint8)
    builder = _AlignedBuilder(len(content) + (len(content) >> 3) + 1024)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def _name_tensors(graph: Any, model: Any, output: str) -> None:
    """Name tensors as the converter numbers them: by default, their names hold those of the network's modules."""
    graph.name = "main"
    for number, tensor in enumerate(graph.tensors):
        tensor.name = f"constant_{number}"
    for number, operator in enumerate(graph.operators):
        code = flatbuffer_utils.get_builtin_code_from_operator_code(model.operatorCodes[operator.opcodeIndex])
        for index in operator.outputs:
            graph.tensors[index].name = f"{_OPERATORS[code]}_{number}"
    graph.tensors[graph.inputs[0]].name = INPUT
    graph.tensors[graph.outputs[0]].name = output
