"""The Open Inference Protocol (KServe's "predict protocol v2") for a classifier, with Triton's binary tensor data.

Converts request bodies to tensors and outputs to response bodies. It performs no I/O and runs no model. A model has one
input, `input`, and one output, `logits` or `probabilities`.

Sources: inference_rest.md of kserve/open-inference-protocol; required_api.md of kserve/kserve for tensor data and
parameters; extension_binary_data.md of triton-inference-server/server.
"""

from collections.abc import Sequence
from http import HTTPStatus
from reprlib import repr as shortened
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from cifarx_serve.images.preprocess import peak_pixels
from cifarx_serve.server.api.open_inference_schemas import (
    INPUT,
    AnyRequest,
    Bytes,
    Fp32,
    InferenceResponse,
    Input,
    ModelMetadata,
    ModelParameters,
    ResponseOutput,
    ResponseParameters,
    ServerMetadata,
    TensorMetadata,
    decode_request,
)
from cifarx_serve.server.api.tensor_codec import (
    EncodedImages,
    Tensor,
    from_binary,
    from_numbers,
    images_from_binary,
    images_from_strings,
)
from cifarx_serve.server.errors import RequestError
from cifarx_serve.spec import ModelSpec

EXTENSIONS: Final = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
"""The extensions of the protocol that are supported, by their names in Triton."""

BYTES: Final = "BYTES"
"""The data type of image files, in the encoding of their format."""

_MAX_OTHER_VALUES: Final = 1024
"""The maximum number of JSON values of a request in addition to the numbers of its tensor."""


class InferRequest(NamedTuple):
    """What an inference request asks for.

    Attributes:
        id: the client's ID of the request, if it sent one.
        tensor: the preprocessed input of the network, finite float32 (N, *spec.input.shape); or pixels, uint8
            (N, H, W, channels). It can be a read-only view of the body. Or the contents of N image files.
        binary_output: whether to return the output as binary data after the JSON.
    """

    id: str | None
    tensor: Tensor | EncodedImages
    binary_output: bool


def server_metadata(version: str) -> ServerMetadata:
    """Return the metadata of a server of this version."""
    return ServerMetadata("cifarx", version, EXTENSIONS)


def model_metadata(name: str, versions: Sequence[str], platform: str, spec: ModelSpec) -> ModelMetadata:
    """Return the metadata of a model.

    The input is described as the model itself takes it; `parse_infer` accepts image files
    too, and for a float32 model pixels.

    Args:
        name: the model's name in the URL.
        versions: the versions that are served.
        platform: the format and runtime, as the protocol names them: `onnx_onnxruntime`, `pytorch_torchscript`, …
        spec: the model's spec.
    """
    outputs = (TensorMetadata(spec.output, "FP32", (-1, spec.output_size)),)
    parameters = ModelParameters(spec.assumption) if spec.assumption else UNSET
    return ModelMetadata(name, tuple(versions), platform, (input_metadata(spec),), outputs, parameters)


def input_metadata(spec: ModelSpec) -> TensorMetadata:
    """Return the metadata of the input tensor as the model itself takes it."""
    datatype, shape = next(iter(_input_shapes(spec).items()))
    return TensorMetadata(INPUT, datatype, tuple([size if isinstance(size, int) else -1 for size in shape]))


def parse_infer(
    body: bytes, header_length: int | None, spec: ModelSpec, max_images: int, max_pixels: int
) -> InferRequest:
    """Parse an inference request.

    Binary tensor data is the only extension of the protocol that is supported. Unknown fields and parameters are
    ignored.

    Args:
        body: the body of the request.
        header_length: the value of the header Inference-Header-Content-Length, the number of bytes of JSON at the
            start of the body; None without the header, when the whole body is JSON.
        spec: the model's spec.
        max_images: the maximum number of images, N.
        max_pixels: the maximum number of pixels of all images together, N * H * W, also before the model crops them.

    Raises:
        RequestError: there are too many images or pixels (413), or the request is not valid for the protocol or the
            model (400).
    """
    length = len(body) if header_length is None else header_length
    if not 0 <= length <= len(body):
        raise _bad_request(
            f"Inference-Header-Content-Length is {length} and the body has {len(body)} bytes",
            "send the length of the JSON at the start of the body",
        )
    content = memoryview(body)
    _limit_values(content[:length], spec, max_images, max_pixels)
    request = _decode(content[:length], spec)
    tensor_input = _only_input(request.inputs)
    check_shape(_datatype(tensor_input), tensor_input.shape, spec, max_images, max_pixels)
    binary_output = _wants_binary_output(request, spec.output)
    tensor = _decode_tensor(tensor_input, None if header_length is None else content[length:])
    return InferRequest(None if request.id is UNSET else request.id, tensor, binary_output)


def _limit_values(document: memoryview, spec: ModelSpec, max_images: int, max_pixels: int) -> None:
    """Limit the memory and the time of decoding JSON: two values have a comma between them, so count the commas."""
    size = spec.input
    pixels = max_pixels if spec.embedded_preprocessing else min(max_pixels, max_images * size.height * size.width)
    max_values = size.channels * pixels + _MAX_OTHER_VALUES
    if len(document) <= max_values:
        return
    commas = int(np.count_nonzero(np.frombuffer(document, np.uint8) == ord(",")))
    if commas > max_values:
        remedy = f"send at most {max_images} images with {pixels} pixels"
        raise _too_large(f"the JSON has more than {commas} values", remedy)


def _decode(document: memoryview, spec: ModelSpec) -> AnyRequest:
    try:
        return decode_request(document, uint8_only=spec.embedded_preprocessing)
    # Invalid UTF-8 and lists nested too deeply raise no error of msgspec.
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise _bad_request(
            f"the body is not a valid inference request ({str(error)[:200]})",
            f"send JSON of the Open Inference Protocol; the model takes {_accepted(spec)}",
        ) from error


def _only_input(inputs: list[Input[list[Any]]]) -> Input[list[Any]]:
    _check_names("input", [tensor_input.name for tensor_input in inputs], INPUT)
    if not inputs:
        raise _bad_request("the request has no inputs", f"send one, named {INPUT!r}")
    return inputs[0]


def _check_names(kind: str, names: list[str], known: str) -> None:
    for name in names:
        if name != known:
            raise _bad_request(f"unknown {kind} {shortened(name)}", f"the model has one {kind}, {known!r}")
    if len(names) > 1:
        raise _bad_request(f"{kind} {known!r} occurs {len(names)} times", "name it once")


def _input_shapes(spec: ModelSpec) -> dict[str, tuple[int | str, ...]]:
    """Return the shape for each data type that is accepted, the model's own first; a letter stands for any size."""
    size = spec.input
    if spec.embedded_preprocessing:
        return {"UINT8": ("N", "H", "W", size.channels), BYTES: ("N",)}
    return {"FP32": ("N", *size.shape), "UINT8": ("N", size.height, size.width, size.channels), BYTES: ("N",)}


def _accepted(spec: ModelSpec) -> str:
    return " or ".join(f"{datatype} [{', '.join(map(str, shape))}]" for datatype, shape in _input_shapes(spec).items())


def _datatype(tensor_input: Input[list[Any]]) -> str:
    if isinstance(tensor_input, Bytes):
        return BYTES
    return "FP32" if isinstance(tensor_input, Fp32) else "UINT8"


def check_shape(datatype: str, shape: Sequence[int], spec: ModelSpec, max_images: int, max_pixels: int) -> None:
    """Check the shape of an input tensor. The pixels of image files are limited when they are decoded.

    Args:
        datatype: FP32, UINT8 or BYTES.
        shape: the shape.
        spec: the model's spec.
        max_images: the maximum number of images, N.
        max_pixels: as for `parse_infer`.

    Raises:
        RequestError: there are too many images or pixels (413), or the model does not take this type or shape (400).
    """
    images, *rest = shape or (0,)
    expected = _input_shapes(spec).get(datatype)
    sizes = shape[:1] if datatype == BYTES and rest == [1] else shape
    if (
        expected is None
        or len(sizes) != len(expected)
        or not all(
            size >= 1 if isinstance(allowed, str) else size == allowed
            for size, allowed in zip(sizes, expected, strict=True)
        )
    ):
        problem = f"the input is {datatype} {shortened(list(shape))}"
        raise _bad_request(problem, f"the model takes {_accepted(spec)}, without empty dimensions")
    if images > max_images:
        raise _too_large(f"{images} images in one request", f"send at most {max_images}")
    if datatype == BYTES:
        return
    height, width = (spec.input.height, spec.input.width) if datatype == "FP32" else rest[:2]
    per_image = peak_pixels(width, height, spec.input) if spec.embedded_preprocessing else width * height
    if (pixels := images * per_image) > max_pixels:
        raise _too_large(f"{images} images of {width} x {height} have {pixels} pixels", f"send at most {max_pixels}")


def _decode_tensor(tensor_input: Input[list[Any]], raw: memoryview | None) -> Tensor | EncodedImages:
    """Return the tensor of the input's data or, if it has a binary_data_size, of `raw`.

    `raw` is the part of the body after the JSON; None if the request has no Inference-Header-Content-Length.
    """
    size = tensor_input.parameters.binary_data_size
    if (size is UNSET) == (tensor_input.data is UNSET):
        found = "neither data nor" if size is UNSET else "both data and"
        raise _bad_request(f"the input has {found} binary_data_size", "send one of them")
    if tensor_input.data is not UNSET:
        if raw:
            raise _bad_request(
                f"{len(raw)} bytes follow the JSON and no input has binary_data_size",
                "set Inference-Header-Content-Length to the length of the JSON",
            )
        if isinstance(tensor_input, Bytes):
            return images_from_strings(tensor_input.data, tensor_input.shape)
        return from_numbers(tensor_input.data, _datatype(tensor_input), tensor_input.shape)
    if raw is None:
        raise _bad_request(
            "binary_data_size requires the header Inference-Header-Content-Length", "send the length of the JSON in it"
        )
    if size != len(raw):
        raise _bad_request(f"binary_data_size is {size} and {len(raw)} bytes follow the JSON", "send as many bytes")
    if isinstance(tensor_input, Bytes):
        return images_from_binary(raw, tensor_input.shape)
    return from_binary(raw, _datatype(tensor_input), tensor_input.shape)


def _wants_binary_output(request: AnyRequest, name: str) -> bool:
    """Return whether to send binary data. The parameter of the output takes precedence over that of the request."""
    _check_names("output", [output.name for output in request.outputs], name)
    for output in request.outputs:
        parameters = output.parameters
        for extension in ("classification", "shared_memory_region"):
            if getattr(parameters, extension) is not UNSET:
                raise _bad_request(
                    f"output {name!r} has the parameter {extension}, which is not supported", "leave it out"
                )
        if parameters.binary_data is not UNSET:
            return parameters.binary_data
    return request.parameters.binary_data_output


def infer_response(
    request: InferRequest, model_name: str, model_version: str, output_name: str, values: NDArray[np.float32]
) -> tuple[bytes, int | None]:
    """Return the body of a response, and the value of its Inference-Header-Content-Length; None if all of it is JSON.

    JSON has no NaN and no infinity: such a number becomes `null`, which tritonclient reads as NaN. Binary data keeps
    every bit.

    Args:
        request: the request.
        model_name: the model's name in the URL.
        model_version: the version of the model that ran.
        output_name: the name of the model's output.
        values: the output, (N, output_size).
    """
    output = ResponseOutput(output_name, "FP32", values.shape)
    response = InferenceResponse(
        model_name=model_name,
        model_version=model_version,
        id=UNSET if request.id is None else request.id,
        outputs=[output],
    )
    if not request.binary_output:
        output.data = values.ravel().tolist()
        return msgspec.json.encode(response), None
    raw = values.astype("<f4", copy=False).tobytes()
    output.parameters = ResponseParameters(len(raw))
    header = msgspec.json.encode(response)
    return header + raw, len(header)


def _bad_request(problem: str, remedy: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, problem, remedy)


def _too_large(problem: str, remedy: str) -> RequestError:
    return RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, remedy)
