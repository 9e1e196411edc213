"""The layers of an ONNX file."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_export.layerwise.network import Activations, Layer, LayerwiseNetwork, TensorKey
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.errors import ModelFileError, error_message
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

_PASS_THROUGH: Final = frozenset({"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Identity", "Reshape"})
"""ONNX operators that may stand between a stored weight and its layer."""


class OnnxNetwork(LayerwiseNetwork):
    """An ONNX file. Intermediate tensors are read by adding them to the outputs of the graph.

    Raises:
        ModelFileError: the file is not an ONNX model.
    """

    def __init__(self, path: Path) -> None:
        import onnx
        from onnx import inliner

        self.spec = read_spec(path)
        self._path = path
        try:
            model = onnx.load(path)
        except Exception as error:  # the errors of onnx's parsers have no common base class
            raise ModelFileError(f"{path} is not an ONNX model ({error})", "export it again") from error
        self._model = inliner.inline_local_functions(model) if model.functions else model
        graph = self._model.graph
        stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._input = next(info.name for info in graph.input if info.name not in stored)
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
        self.output_label = self._producer_label(graph.output[0].name)

    def _find_layers(self) -> Iterator[Layer]:
        calls: Counter[str] = Counter()
        for node in self._model.graph.node:
            weight = self._stored_weight(node.input[1]) if node.op_type in _WEIGHTED else None
            if weight is None:
                continue
            name = weight.partition(".weight")[0]
            yield Layer(
                name=name,
                call=calls[name],
                label=_describe(node),
                weight_shape=tuple(sorted(self._constants[weight])),
                is_norm=node.op_type == "BatchNormalization",
                input=node.input[0],
                input_label=self._producer_label(node.input[0]),
                output=self._output_with_bias(node),
            )
            calls[name] += 1

    def _stored_weight(self, name: str) -> str | None:
        """Return the initializer or constant that a tensor comes from, or None if it depends on the image."""
        while name not in self._constants:
            producer = self._producers.get(name)
            if producer is None or producer.op_type not in _PASS_THROUGH:
                return None
            name = producer.input[0]
        return name

    def _output_with_bias(self, node: Any) -> str:
        """Return the output of a layer; for a MatMul followed by the Add of its bias, the output of the Add."""
        output: str = node.output[0]
        if node.op_type == "MatMul":
            consumers = [other for other in self._model.graph.node if output in other.input]
            if len(consumers) == 1 and consumers[0].op_type == "Add":
                other = next((name for name in consumers[0].input if name != output), "")
                if len(self._constants.get(other, ())) == 1:
                    return str(consumers[0].output[0])
        return output

    def _producer_label(self, name: str) -> str:
        return _describe(self._producers[name]) if name in self._producers else "the network's input"

    def activations(self, keys: set[TensorKey], images: NDArray[np.uint8]) -> Activations:
        inputs = model_input(images, self.spec)
        names = [str(key) for key in keys if key != self._input]
        try:
            outputs = self._session(names).run(names, {self._input: inputs})
        except Exception as error:  # the errors of ONNX Runtime have no common base class
            raise ModelFileError(
                f"{self._path} does not run layer by layer ({error_message(error)})", "leave --locate out"
            ) from error
        return dict(zip([*names, self._input], [*outputs, inputs], strict=True))

    def _session(self, names: Sequence[str]) -> Any:
        """Return a session of the model with these tensors as additional outputs."""
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised as exceptions too
        options.intra_op_num_threads = available_cpus()
        outputs = self._model.graph.output
        original = len(outputs)
        outputs.extend(onnx.ValueInfoProto(name=name) for name in names if name != self.output)
        try:
            return onnxruntime.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        finally:
            del outputs[original:]


def _describe(node: Any) -> str:
    return f"{node.op_type} node '{node.name}'" if node.name else f"{node.op_type} node of '{node.output[0]}'"
