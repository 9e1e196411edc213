"""A node of an ONNX graph."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from cifarx_export.onnx_network.values import Value


class Node(NamedTuple):
    """One operator of a graph.

    Attributes:
        operator: name of the operator, such as `Conv`.
        inputs: names of its inputs, empty for those that are left out.
        outputs: names of its outputs.
        attributes: its attributes as Python and NumPy values.
        opset: version of the operators.
    """

    operator: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Any]
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default of the operator."""
        return self.attributes.get(name, default)


Operator: TypeAlias = Callable[..., Value | Sequence[Value]]
"""Computes the outputs of a node from the node and its inputs, of which trailing ones can be left out.

It raises `NotImplementedError` for an attribute that is not supported, and for shapes that depend on the values of the
images.
"""
