"""A network read as a list of layers, the operations that have a weight, whatever file it is in."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import ModelSpec

Key: TypeAlias = tuple[str, int, bool] | str
"""A value inside a network: a tensor's name, or a module's name, which of its calls, and whether its output."""

Values: TypeAlias = dict[Key, NDArray[Any]]


class Layer(NamedTuple):
    """An operation with a weight.

    Attributes:
        name: of the module that has the weight, as far as the file says it.
        call: how many layers before it have that name.
        label: what it is, for the report.
        weight: the weight's shape, its axes in ascending order: some formats transpose.
        is_norm: whether it is a BatchNorm.
        fed: what it takes.
        feeder: what made that, for the report.
        result: what it gives.
    """

    name: str
    call: int
    label: str
    weight: tuple[int, ...]
    is_norm: bool
    fed: Key
    feeder: str
    result: Key


class Network(ABC):
    """A network whose insides can be looked into.

    Attributes:
        layers: in the order of execution.
        output: the logits.
        output_label: what makes them, for the report.
    """

    spec: ModelSpec
    layers: list[Layer]
    output: Key
    output_label: str

    @abstractmethod
    def values(self, keys: set[Key], images: NDArray[np.uint8]) -> Values:
        """These values for the images, run on the CPU."""

    def norm_after(self, layer: Layer) -> Layer | None:
        """The BatchNorm that takes the layer's result as it is."""
        return next((other for other in self.layers if other.is_norm and other.fed == layer.result), None)
