"""Parses the messages of the Open Inference Protocol, and builds its answers. Runs no model.

The messages are those of Triton, a superset of KServe's. Raw tensor data is answered with raw tensor data, and typed
contents with typed contents.

Sources: inference_grpc.md of kserve/open-inference-protocol; grpc_service.proto of triton-inference-server/common.
"""

import math
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from reprlib import repr as shortened
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from cifarx_serve.server.api.open_inference import BYTES, check_shape
from cifarx_serve.server.api.open_inference_schemas import INPUT, ModelMetadata
from cifarx_serve.server.api.tensor_codec import EncodedImages, Tensor, from_binary, images_from_binary
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.grpc.wire_format import require_few_fields
from cifarx_serve.server.settings import Limits
from cifarx_serve.spec import ModelSpec

AnyMessage = TypeVar("AnyMessage", bound=Message)

_CONTENTS: Final = {"FP32": "fp32_contents", "UINT8": "uint_contents", BYTES: "bytes_contents"}
"""The field of typed contents for each data type."""

_SHARED_MEMORY: Final = "shared_memory_region"
_REFUSED_OUTPUT_PARAMETERS: Final = ("classification", _SHARED_MEMORY)
_FINAL_RESPONSE: Final = "triton_final_response"


class InferRequest(NamedTuple):
    """What an inference request asks for.

    Attributes:
        id: the client's ID of the request; empty if it sent none.
        tensor: the preprocessed input of the network, finite float32 (N, *spec.input.shape); or pixels, uint8
            (N, H, W, channels). It can be read-only. Or the contents of N image files.
        raw: whether the tensor was sent as raw data, which the output then is too.
    """

    id: str
    tensor: Tensor | EncodedImages
    raw: bool


def parse(raw: bytes, message_type: type[AnyMessage]) -> AnyMessage:
    """Return a message from its bytes.

    Raises:
        RequestError: the bytes are not such a message, or have too many fields (400).
    """
    require_few_fields(raw)
    message = message_type()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        problem = f"{len(raw)} bytes are not a valid {message_type.DESCRIPTOR.full_name}"
        raise _bad_request(problem, "send the message in the encoding of Protocol Buffers") from error
    return message  # type: ignore[no-any-return]  # the types of protobuf are not known


def parse_infer(request: service_pb2.ModelInferRequest, spec: ModelSpec, limits: Limits) -> InferRequest:
    """Return what an inference request asks for. Parameters that are not known are ignored.

    Raises:
        RequestError: there are too many images or pixels (413), or the request is not valid for the protocol or the
            model (400).
    """
    tensor = _only("input", request.inputs, INPUT)
    for output in request.outputs:
        _check_output_parameters(output)
    if request.outputs:
        _only("output", request.outputs, spec.output)
    if _SHARED_MEMORY in tensor.parameters:
        raise _unsupported("input", INPUT, _SHARED_MEMORY)
    shape = list(tensor.shape)
    check_shape(tensor.datatype, shape, spec, limits.max_images, limits.max_pixels)
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    if not request.raw_input_contents:
        return InferRequest(request.id, _typed_contents(tensor.contents, filled, tensor.datatype, shape), raw=False)
    if filled or len(request.raw_input_contents) != 1:
        found = f"{len(request.raw_input_contents)} raw_input_contents and {len(filled)} fields of contents"
        raise _bad_request(f"the request has one input, {found}", "send one of either")
    data = request.raw_input_contents[0]
    if tensor.datatype == BYTES:
        return InferRequest(request.id, images_from_binary(data, shape), raw=True)
    return InferRequest(request.id, from_binary(memoryview(data), tensor.datatype, shape), raw=True)


def _only(kind: str, tensors: Any, known: str) -> Any:
    """Return the only tensor, after checking its name."""
    for tensor in tensors:
        if tensor.name != known:
            raise _bad_request(f"unknown {kind} {shortened(tensor.name)}", f"the model has one {kind}, {known!r}")
    if len(tensors) != 1:
        raise _bad_request(f"the request has {len(tensors)} {kind}s", f"send one, named {known!r}")
    return tensors[0]


def _check_output_parameters(output: Any) -> None:
    parameters: Mapping[str, Any] = output.parameters
    for name in _REFUSED_OUTPUT_PARAMETERS:
        if name in parameters:
            raise _unsupported("output", output.name, name)


def _typed_contents(contents: Any, filled: list[str], datatype: str, shape: list[int]) -> Tensor | EncodedImages:
    """Return the tensor of the typed contents; `filled` are the names of their fields that are not empty."""
    name = _CONTENTS[datatype]
    if filled != [name]:
        found = ", ".join(filled) or "neither contents nor raw_input_contents"
        raise _bad_request(f"the input of type {datatype} has {found}", f"send {name} or raw_input_contents")
    elements, count = getattr(contents, name), math.prod(shape)
    if len(elements) != count:
        raise _bad_request(f"{name} has {len(elements)} elements and the shape is {shape}", f"send {count}")
    numbers = list(elements)
    if datatype == BYTES:
        return numbers
    if datatype == "UINT8":
        if (largest := max(numbers)) > 255:
            raise _bad_request(f"uint_contents has {largest}", "send numbers from 0 to 255 for UINT8")
        return np.array(numbers, np.uint8).reshape(shape)
    return from_binary(memoryview(np.array(numbers, "<f4").tobytes()), datatype, shape)


def infer_response(
    request: InferRequest, model_name: str, model_version: str, output_name: str, values: NDArray[np.float32]
) -> service_pb2.ModelInferResponse:
    """Return the answer to a request.

    Args:
        request: the request.
        model_name: the model's name.
        model_version: the version of the model that ran.
        output_name: the name of the model's output.
        values: the output, (N, output_size).
    """
    response = service_pb2.ModelInferResponse(model_name=model_name, model_version=model_version, id=request.id)
    output = response.outputs.add(name=output_name, datatype="FP32", shape=values.shape)
    if request.raw:
        response.raw_output_contents.append(values.astype("<f4", copy=False).tobytes())
    else:
        output.contents.fp32_contents.extend(values.ravel().tolist())
    return response


def stream_response(response: service_pb2.ModelInferResponse) -> service_pb2.ModelStreamInferResponse:
    """Return the answer to a request of a stream. It is the only one, so it has Triton's mark of the final one."""
    response.parameters[_FINAL_RESPONSE].bool_param = True
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def stream_error(request_id: str, message: str) -> service_pb2.ModelStreamInferResponse:
    """Return the answer to a request of a stream that failed; it has the ID of the request."""
    response = stream_response(service_pb2.ModelInferResponse(id=request_id))
    response.error_message = message
    return response


def model_metadata_response(metadata: ModelMetadata) -> service_pb2.ModelMetadataResponse:
    """Return the metadata of a model as a message. It has no place for what was assumed about the model."""
    tensor_type = service_pb2.ModelMetadataResponse.TensorMetadata

    def tensors(described: Iterable[Any]) -> list[Any]:
        return [tensor_type(name=each.name, datatype=each.datatype, shape=each.shape) for each in described]

    return service_pb2.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=tensors(metadata.inputs),
        outputs=tensors(metadata.outputs),
    )


def _unsupported(kind: str, name: str, parameter: str) -> RequestError:
    return _bad_request(f"{kind} {name!r} has the parameter {parameter}, which is not supported", "leave it out")


def _bad_request(problem: str, remedy: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, problem, remedy)
