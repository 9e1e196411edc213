"""Load an ONNX model together with the weights that it stores in other files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from cifarx_serve.backends.base import require_file
from cifarx_serve.errors import ModelFileError, error_message


def load_onnx_model(path: Path) -> ModelProto:
    """Load a model with all of its weights in memory.

    Raises:
        ModelFileError: the file is missing or is not an ONNX model, its weights are missing or outside of its folder,
            or the model is larger than 2 GB, the limit of protobuf.
    """
    require_file(path)
    _require_size(path, path.stat().st_size)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # the errors of onnx's parsers have no common base class
        raise ModelFileError(f"{path} is not an ONNX model ({error_message(error)})", "give an ONNX file") from error
    model.DiscardUnknownFields()  # such as the checksum of a file of cifarx, which is that of this file
    external = [tensor for tensor in _tensors(model) if uses_external_data(tensor)]
    if not external:
        return model
    _require_size(path, path.stat().st_size + sum(_external_size(tensor, path) for tensor in external))
    try:
        # The library refuses locations outside of the folder, and links.
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # see above
        raise ModelFileError(
            f"the weights of {path} cannot be read ({error_message(error)})", "put the file with its weights next to it"
        ) from error
    return model


def _require_size(path: Path, size: int) -> None:
    if size > onnx.checker.MAXIMUM_PROTOBUF:
        raise ModelFileError(
            f"{path} is {size / 2**30:.1f} GB with its weights, but one ONNX file holds at most 2 GB",
            "convert it to float16 first, or export the PyTorch network with `cifarx export --format pt2`",
        )


def _external_size(tensor: TensorProto, path: Path) -> int:
    """Return the number of bytes that a tensor takes in another file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        return int(entries.get("length") or (path.parent / entries["location"]).stat().st_size)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(
            f"the weights of {path} cannot be read ({error_message(error)})", "put the file with its weights next to it"
        ) from error


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a model, also those in attributes and subgraphs."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("g"):
        yield from _graph_tensors(attribute.g)
    for graph in attribute.graphs:
        yield from _graph_tensors(graph)
