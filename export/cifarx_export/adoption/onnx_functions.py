"""Inline the functions of an ONNX model: a file of a kilobyte can define functions that expand to billions of nodes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeAlias

from onnx import FunctionProto, ModelProto, NodeProto
from onnx.inliner import inline_local_functions

from cifarx_serve.errors import ModelFileError, error_message

_MAX_NODES: Final = 100_000
"""The largest number of nodes of the inlined model. The graph of a large vision transformer has several thousand."""

_MAX_DEPTH: Final = 100
"""The largest depth of functions that call each other."""

_Key: TypeAlias = tuple[str, str, str]


def inline_functions(model: ModelProto, path: Path) -> ModelProto:
    """Return a model without functions, or the model itself if it has none.

    Args:
        model: the model.
        path: the file, for messages.

    Raises:
        ModelFileError: the functions call each other without end, would expand to too many nodes, or are not valid.
    """
    if not model.functions:
        return model
    sizes = _Sizes(model.functions, path)
    if sizes.of_nodes(model.graph.node, 0) > _MAX_NODES:
        raise ModelFileError(f"the functions of {path} expand to more than {_MAX_NODES:,} nodes", "give another file")
    try:
        return inline_local_functions(model)
    except Exception as error:  # the errors of onnx's C++ code have no common base class
        problem = f"the functions of {path} cannot be inlined ({error_message(error)})"
        raise ModelFileError(problem, "give another file") from error


class _Sizes:
    """Counts the nodes that the functions of a model expand to, without expanding them."""

    def __init__(self, functions: Iterable[FunctionProto], path: Path) -> None:
        self._functions = {_key(function): function for function in functions}
        self._path = path
        self._known: dict[_Key, int] = {}

    def of_nodes(self, nodes: Iterable[NodeProto], depth: int) -> int:
        """Return the number of nodes, with those of functions and subgraphs."""
        return sum(self._of_node(node, depth) for node in nodes)

    def _of_node(self, node: NodeProto, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise ModelFileError(f"the functions of {self._path} call each other without end", "give another file")
        size = 1
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                size += self.of_nodes(graph.node, depth + 1)
        key = node.domain, node.op_type, node.overload
        if key in self._functions:
            if key not in self._known:
                self._known[key] = self.of_nodes(self._functions[key].node, depth + 1)
            size += self._known[key]
        return size


def _key(function: FunctionProto) -> _Key:
    return function.domain, function.name, function.overload
