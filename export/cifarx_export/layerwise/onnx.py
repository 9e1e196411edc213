"""The layers of an ONNX file, and the values between them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_export.layerwise.network import Key, Layer, Network, Values
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.errors import ModelFileError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.system.cpus import available_cpus

_WEIGHTED: Final = frozenset(
    {
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "BatchNormalization",
        "LayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
    }
)
"""ONNX operators whose second input is the weight."""

_SAME_WEIGHT: Final = frozenset({"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Identity", "Reshape"})
"""ONNX operators between a stored weight and the layer that has it."""


class OnnxNetwork(Network):
    """An ONNX file; inside values are made outputs of the graph, for ONNX Runtime to give."""

    def __init__(self, path: Path) -> None:
        import onnx
        from onnx import inliner

        self.spec = read_spec(path)
        self._path = path
        try:
            model = onnx.load(path)
        except Exception as error:  # what its parsers raise has no common base
            raise ModelFileError(f"{path} is not an ONNX model ({error})", "export it again") from error
        self._model = inliner.inline_local_functions(model) if model.functions else model
        graph = self._model.graph
        stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._input = next(port.name for port in graph.input if port.name not in stored)
        self._producers = {name: node for node in graph.node for name in node.output}
        self._constants = stored | {
            node.output[0]: tuple(attribute.t.dims)
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.layers = list(self._find_layers())
        self.output = graph.output[0].name
        self.output_label = self._maker(graph.output[0].name)

    def _find_layers(self) -> Iterator[Layer]:
        calls: Counter[str] = Counter()
        for node in self._model.graph.node:
            weight = self._stored_weight(node.input[1]) if node.op_type in _WEIGHTED else None
            if weight is None:
                continue
            name = weight.partition(".weight")[0]
            yield Layer(
                name,
                calls[name],
                _describe(node),
                tuple(sorted(self._constants[weight])),
                node.op_type == "BatchNormalization",
                node.input[0],
                self._maker(node.input[0]),
                self._with_bias(node),
            )
            calls[name] += 1

    def _stored_weight(self, name: str) -> str | None:
        """The initializer or constant that an input comes from, or None where it is computed from the image."""
        while name not in self._constants:
            producer = self._producers.get(name)
            if producer is None or producer.op_type not in _SAME_WEIGHT:
                return None
            name = producer.input[0]
        return name

    def _with_bias(self, node: Any) -> str:
        """A layer's result; a MatMul's is that of the Add of its bias, where one follows."""
        result: str = node.output[0]
        if node.op_type == "MatMul":
            takers = [other for other in self._model.graph.node if result in other.input]
            if len(takers) == 1 and takers[0].op_type == "Add":
                other = next((name for name in takers[0].input if name != result), "")
                if len(self._constants.get(other, ())) == 1:
                    return str(takers[0].output[0])
        return result

    def _maker(self, name: str) -> str:
        return _describe(self._producers[name]) if name in self._producers else "the network's input"

    def values(self, keys: set[Key], images: NDArray[np.uint8]) -> Values:
        feed = model_input(images, self.spec)
        names = [str(key) for key in keys if key != self._input]
        try:
            found = self._session(names).run(names, {self._input: feed})
        except Exception as error:  # the library's errors have no common base
            reason = str(error).strip().partition("\n")[0]
            raise ModelFileError(
                f"{self._path} does not run layer by layer ({reason})", "leave --locate out"
            ) from error
        return dict(zip([*names, self._input], [*found, feed], strict=True))

    def _session(self, names: Sequence[str]) -> Any:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised too
        options.intra_op_num_threads = available_cpus()
        outputs = self._model.graph.output
        own = len(outputs)
        outputs.extend(onnx.ValueInfoProto(name=name) for name in names if name != self.output)
        try:
            return onnxruntime.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        finally:
            del outputs[own:]


def _describe(node: Any) -> str:
    return f"{node.op_type} node '{node.name}'" if node.name else f"{node.op_type} node of '{node.output[0]}'"
