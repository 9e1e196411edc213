"""A network as a list of layers with weights, independent of the file format."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import ModelSpec

TensorKey: TypeAlias = tuple[str, int, bool] | str
"""Key of a tensor inside a network.

The name of a tensor in an ONNX graph; or the name of a PyTorch module, the index of its call, and whether the tensor is
its output rather than its input.
"""

Activations: TypeAlias = dict[TensorKey, NDArray[Any]]


class Layer(NamedTuple):
    """An operation with a weight.

    Attributes:
        name: name of the module that owns the weight, as far as the file states it.
        call: number of earlier layers with the same name.
        label: description for the report.
        weight_shape: shape of the weight with its axes sorted, because some formats transpose it.
        is_norm: whether it is a BatchNorm.
        input: key of its input.
        input_label: description of the operation that computes its input, for the report.
        output: key of its output.
    """

    name: str
    call: int
    label: str
    weight_shape: tuple[int, ...]
    is_norm: bool
    input: TensorKey
    input_label: str
    output: TensorKey


class LayerwiseNetwork(ABC):
    """A network whose intermediate tensors can be read.

    Attributes:
        spec: its model spec.
        layers: layers in the order of execution.
        output: key of the logits.
        output_label: description of the operation that computes the logits, for the report.
    """

    spec: ModelSpec
    layers: list[Layer]
    output: TensorKey
    output_label: str

    @abstractmethod
    def activations(self, keys: set[TensorKey], images: NDArray[np.uint8]) -> Activations:
        """Run the network on the CPU and return the tensors with these keys.

        Args:
            keys: keys of layers, or `output`.
            images: uint8 (N, height, width, 3) at the network's input size.
        """

    def batch_norm_after(self, layer: Layer) -> Layer | None:
        """Return the BatchNorm whose input is this layer's output, if there is one."""
        return next((other for other in self.layers if other.is_norm and other.input == layer.output), None)
