"""The Open Inference Protocol (KServe's "predict protocol v2") for a classifier, with Triton's binary tensor data.

From bytes to a tensor and from logits to bytes; no network and no model. A model has one input, `input`, and one
output, `logits`. The texts: inference_rest.md of kserve/open-inference-protocol, required_api.md of kserve/kserve (for
tensor data and parameters), extension_binary_data.md of triton-inference-server/server.
"""

from collections.abc import Sequence
from http import HTTPStatus
from reprlib import repr as shortened
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from cifarx_serve.server.api.open_inference_schemas import (
    AnyRequest,
    Fp32,
    Input,
    Response,
    ResponseOutput,
    ResponseParameters,
    decode_request,
)
from cifarx_serve.server.api.tensor_codec import Tensor, from_binary, from_numbers
from cifarx_serve.server.errors import RequestError
from cifarx_serve.spec import ModelSpec

INPUT: Final = "input"
OUTPUT: Final = "logits"

_OTHER_VALUES: Final = 1024
"""JSON values that a request may hold beside those of its tensor."""


class InferRequest(NamedTuple):
    """A request for the logits of a tensor.

    Attributes:
        id: the client's; None where it gave none.
        tensor: float32 (N, 3, height, width), finite, as the network takes it; or uint8 (N, H, W, 3), RGB pixels. Not
            to be written to: it may be a view of the body.
        binary_output: whether the logits go out as bytes after the JSON.
    """

    id: str | None
    tensor: Tensor
    binary_output: bool


class ServerMetadata(msgspec.Struct, frozen=True):
    """The protocol's metadata_server_response."""

    name: str
    version: str
    extensions: tuple[str, ...]


class TensorMetadata(msgspec.Struct, frozen=True):
    """The protocol's metadata_tensor: -1 is a size that may vary."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct, frozen=True):
    """The protocol's metadata_model_response."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


def server_metadata(version: str) -> ServerMetadata:
    """What the server says about itself; `version` is its own."""
    return ServerMetadata("cifarx", version, ("binary_tensor_data",))


def model_metadata(name: str, versions: Sequence[str], platform: str, spec: ModelSpec) -> ModelMetadata:
    """What the server says about a model.

    The input is told as the model itself takes it; of a float32 model, `parse_infer` takes pixels too.

    Args:
        name: the model's name in the URL.
        versions: those that may be asked for.
        platform: the backend, in the protocol's words: `onnx_onnxruntime`, `pytorch_torchscript` ….
        spec: the model's.
    """
    datatype, layout = next(iter(_layouts(spec).items()))
    shape = tuple([size if isinstance(size, int) else -1 for size in layout])
    taken = TensorMetadata(INPUT, datatype, shape)
    given = TensorMetadata(OUTPUT, "FP32", (-1, len(spec.class_names)))
    return ModelMetadata(name, tuple(versions), platform, (taken,), (given,))


def parse_infer(
    body: bytes, header_length: int | None, spec: ModelSpec, max_images: int, max_pixels: int
) -> InferRequest:
    """Read an inference request.

    Of the protocol's extensions, only binary tensor data is there. Other fields and parameters are ignored.

    Args:
        body: the whole body.
        header_length: the value of Inference-Header-Content-Length: the bytes of JSON that the body begins with. None
            where there is no such header, and the body is JSON.
        spec: the model's.
        max_images: the most images, N.
        max_pixels: the most pixels of all images together, N * H * W.

    Raises:
        RequestError: 413 for too many images or pixels; 400 for all else that is not as the protocol and the model
            have it.
    """
    length = len(body) if header_length is None else header_length
    if not 0 <= length <= len(body):
        raise _bad(
            f"Inference-Header-Content-Length is {length}, and the body has {len(body)} bytes",
            "give the length of the JSON that the body begins with",
        )
    content = memoryview(body)
    _require_few_values(content[:length], spec, max_images, max_pixels)
    request = _request(content[:length], spec)
    entry = _only_input(request.inputs)
    _require_shape(entry, spec, max_images, max_pixels)
    binary_output = _binary_output(request)
    tensor = _tensor(entry, None if header_length is None else content[length:])
    return InferRequest(None if request.id is UNSET else request.id, tensor, binary_output)


def _require_few_values(document: memoryview, spec: ModelSpec, max_images: int, max_pixels: int) -> None:
    """A comma stands between any two values: counting them first bounds the memory and the time of decoding."""
    taken = spec.input
    pixels = max_pixels if spec.embedded_preprocessing else min(max_pixels, max_images * taken.height * taken.width)
    most = 3 * pixels + _OTHER_VALUES
    if len(document) <= most:
        return
    commas = int(np.count_nonzero(np.frombuffer(document, np.uint8) == ord(",")))
    if commas > most:
        raise _too_large(f"the JSON holds over {commas} values", f"send at most {max_images} images, {pixels} pixels")


def _request(document: memoryview, spec: ModelSpec) -> AnyRequest:
    try:
        return decode_request(document, pixels_only=spec.embedded_preprocessing)
    # Bytes that are no UTF-8 and brackets nested without end are not errors of msgspec's own.
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise _bad(
            f"the body is no inference request ({str(error)[:200]})",
            f"send JSON as the Open Inference Protocol has it; the model takes {_taken(spec)}",
        ) from error


def _only_input(inputs: list[Input[list[Any]]]) -> Input[list[Any]]:
    _require_names("input", [entry.name for entry in inputs], INPUT)
    if not inputs:
        raise _bad("the request has no inputs", f"give one, named {INPUT!r}")
    return inputs[0]


def _require_names(kind: str, names: list[str], known: str) -> None:
    for name in names:
        if name != known:
            raise _bad(f"unknown {kind} {shortened(name)}", f"the model has one {kind}, {known!r}")
    if len(names) > 1:
        raise _bad(f"{kind} {known!r} stands there {len(names)} times", "name it once")


def _layouts(spec: ModelSpec) -> dict[str, tuple[int | str, ...]]:
    """The shape of each data type that is taken, the model's own first; what may vary is a letter."""
    if spec.embedded_preprocessing:
        return {"UINT8": ("N", "H", "W", 3)}
    height, width = spec.input.height, spec.input.width
    return {"FP32": ("N", 3, height, width), "UINT8": ("N", height, width, 3)}


def _taken(spec: ModelSpec) -> str:
    return " or ".join(f"{datatype} [{', '.join(map(str, layout))}]" for datatype, layout in _layouts(spec).items())


def _datatype(entry: Input[list[Any]]) -> str:
    return "FP32" if isinstance(entry, Fp32) else "UINT8"


def _require_shape(entry: Input[list[Any]], spec: ModelSpec, max_images: int, max_pixels: int) -> None:
    datatype, shape = _datatype(entry), entry.shape
    layout = _layouts(spec)[datatype]
    if len(shape) != len(layout) or not all(
        size >= 1 if isinstance(wanted, str) else size == wanted for size, wanted in zip(shape, layout, strict=True)
    ):
        raise _bad(f"a tensor of {datatype} {shortened(shape)}", f"the model takes {_taken(spec)}, no size 0")
    if shape[0] > max_images:
        raise _too_large(f"{shape[0]} images in one request", f"send at most {max_images}")
    height, width = shape[2:] if datatype == "FP32" else shape[1:3]
    if (pixels := shape[0] * height * width) > max_pixels:
        raise _too_large(f"{shape[0]} images of {width} x {height} are {pixels} pixels", f"send at most {max_pixels}")


def _tensor(entry: Input[list[Any]], raw: memoryview | None) -> Tensor:
    """From the input's data, or from `raw`, what follows the JSON; None where no header said that something does."""
    size = entry.parameters.binary_data_size
    if (size is UNSET) == (entry.data is UNSET):
        found = "neither data nor" if size is UNSET else "both data and"
        raise _bad(f"the input has {found} binary_data_size", "give one of them")
    if entry.data is not UNSET:
        if raw:
            raise _bad(
                f"{len(raw)} bytes follow the JSON, and no input has binary_data_size",
                "give Inference-Header-Content-Length the length of the JSON",
            )
        return from_numbers(entry.data, _datatype(entry), entry.shape)
    if raw is None:
        raise _bad("binary_data_size without the header Inference-Header-Content-Length", "send the length of the JSON")
    if size != len(raw):
        raise _bad(f"binary_data_size is {size}, and {len(raw)} bytes follow the JSON", "give the size of what is sent")
    return from_binary(raw, _datatype(entry), entry.shape)


def _binary_output(request: AnyRequest) -> bool:
    """What the output itself says goes before what the request says of all."""
    _require_names("output", [output.name for output in request.outputs], OUTPUT)
    for output in request.outputs:
        asked = output.parameters
        for extension in ("classification", "shared_memory_region"):
            if getattr(asked, extension) is not UNSET:
                raise _bad(
                    f"output {OUTPUT!r} asks for {extension}", "leave it out: the server gives logits as they are"
                )
        if asked.binary_data is not UNSET:
            return asked.binary_data
    return request.parameters.binary_data_output


def infer_response(
    request: InferRequest, model_name: str, model_version: str, logits: NDArray[np.float32]
) -> tuple[bytes, int | None]:
    """The body that answers a request, and the value of its Inference-Header-Content-Length; None for JSON alone.

    JSON has no NaN and no infinities: such a logit is `null` in it, which NumPy and tritonclient read as NaN. Binary
    output carries each bit as it is.

    Args:
        request: what was asked.
        model_name: as in the URL.
        model_version: of the file that ran.
        logits: (N, classes).
    """
    output = ResponseOutput(OUTPUT, "FP32", logits.shape)
    response = Response(model_name, model_version, UNSET if request.id is None else request.id, [output])
    if not request.binary_output:
        output.data = logits.ravel().tolist()
        return msgspec.json.encode(response), None
    raw = logits.astype("<f4", copy=False).tobytes()
    output.parameters = ResponseParameters(len(raw))
    header = msgspec.json.encode(response)
    return header + raw, len(header)


def _bad(problem: str, remedy: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, problem, remedy)


def _too_large(problem: str, remedy: str) -> RequestError:
    return RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, remedy)
