"""Search for an int8 version of an ONNX model that agrees with the fp32 model, with as few layers in fp32 as possible.

Activations are uint8 with one scale per tensor. Weights are int8 with one scale per output channel, and use 7 bits:
this way the sums of products cannot overflow on CPUs without dot-product instructions (x86 before VNNI), so the outputs
and the result of the parity check are the same on every CPU. GPTQ more than makes up for the missing bit.
"""

from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from cifarx_export.formats.int8.calibration import calibrate
from cifarx_export.formats.int8.search import MixedPrecision, MixedPrecisionSearch, Network
from cifarx_export.formats.onnx.constant_folding import fold_constants
from cifarx_export.formats.onnx.int8.gain import check_gain, int8_share
from cifarx_export.formats.onnx.int8.gptq import quantize_weights
from cifarx_export.formats.onnx.int8.graph import insert_qdq, tensors_to_calibrate
from cifarx_export.formats.onnx.int8.inference import iterate_activations, open_session, run_in_batches
from cifarx_export.formats.onnx.int8.layers import find_layers, macs_per_image
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.parity.checks import Check
from cifarx_serve.errors import UsageError

_PROTOBUF_LIMIT: Final = 2**31 - 1


class QuantizationSearch(MixedPrecisionSearch):
    """Quantizes an fp32 model to int8, with layers in mixed precision where the agreement requires it.

    Args:
        model: an fp32 model from `input`, float32 (batch, *input.shape), to its only output. It is not modified.
        source: provides the training images, and how many of them to calibrate on.

    Raises:
        UsageError: the model exceeds protobuf's limit of 2 GB, or see `MixedPrecisionSearch`.
        DataError: there are fewer than two training images.
    """

    def __init__(self, model: ModelProto, source: ConversionSource) -> None:
        _require_size(model)
        self._model = fold_constants(model)
        self._macs = macs_per_image(self._model)
        super().__init__(source, find_layers(self._model), sum(self._macs.values()))

    def calibrate(self, inputs: NDArray[np.float32]) -> None:
        names = tensors_to_calibrate(self._model)
        self._ranges = calibrate(iterate_activations(self._model, names, inputs))
        self._progress("int8: quantizing the weights with GPTQ")
        self._weights = quantize_weights(self._model, insert_qdq(self._model, self._ranges["minmax"]), inputs)

    def candidates(self) -> Iterator[tuple[ModelProto, dict[str, str]]]:
        """Yield a quantized model for each of `choices`, with the facts that its spec records."""
        for choice, agreement in self.choices():
            model = self.build(choice)
            share = int8_share(model, self._macs)
            yield model, self.describe(choice, agreement, "7 bits, per channel, rounded by GPTQ", share)

    def open(self, choice: MixedPrecision | None) -> Network:
        return partial(run_in_batches, open_session(self._model if choice is None else self.build(choice)))

    def build(self, choice: MixedPrecision) -> ModelProto:
        """Return the quantized model."""
        fp32_nodes = [node for layer in choice.fp32_layers for node in layer.nodes]
        model = insert_qdq(self._model, self._ranges[choice.method], fp32_nodes)
        for tensor in model.graph.initializer:
            if tensor.name in self._weights:
                tensor.CopyFrom(numpy_helper.from_array(self._weights[tensor.name], tensor.name))
        return model

    def check_gain(self, model: ModelProto) -> Check:
        """Check that a quantized model has gained something: multiplications in int8, or a smaller size."""
        return check_gain(model, self._model, self._macs)


def _require_size(model: ModelProto) -> None:
    if (size := model.ByteSize()) > _PROTOBUF_LIMIT:
        raise UsageError(
            f"the network is too large for int8, {size / 2**30:.1f} GB",
            "use --precision fp16; the limit of protobuf is 2 GB",
        )
