"""The JSON of the Open Inference Protocol.

Fields and parameters of a request that are not declared here are ignored; the others are validated while they are
decoded.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

INPUT: Final = "input"
OUTPUTS: Final = ("logits", "probabilities")
"""The output of a model has one of these names, as its spec says."""

Size: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Byte: TypeAlias = Annotated[int, Meta(ge=0, le=255)]

# `extra_json_schema` is documentation: these rules are checked after decoding, with clearer error messages.
InputName: TypeAlias = Annotated[str, Meta(extra_json_schema={"const": INPUT})]
OutputName: TypeAlias = Annotated[str, Meta(extra_json_schema={"enum": OUTPUTS})]
Shape: TypeAlias = Annotated[list[Size], Meta(extra_json_schema={"minItems": 4, "maxItems": 4})]
ElementsShape: TypeAlias = Annotated[list[Size], Meta(extra_json_schema={"minItems": 1, "maxItems": 2})]

Number = TypeVar("Number")
Data = TypeVar("Data")
AnyInput = TypeVar("AnyInput")

Flat: TypeAlias = list[Number]
Nested: TypeAlias = list[list[list[list[Number]]]]


class InputParameters(msgspec.Struct, frozen=True):
    """Parameters of an input. `binary_data_size` is the number of bytes of its tensor after the JSON."""

    binary_data_size: Size | UnsetType = UNSET


class Input(msgspec.Struct, Generic[Data], tag_field="datatype"):
    """The input tensor, `request_input` in the protocol. Each subclass is one data type."""

    name: InputName
    shape: Shape
    parameters: InputParameters = InputParameters()
    data: Data | UnsetType = UNSET


class Fp32(Input[Data], Generic[Data], tag="FP32"):
    """An input of type float32."""


class Uint8(Input[Data], Generic[Data], tag="UINT8"):
    """An input of type uint8."""


class Bytes(Input[Data], Generic[Data], tag="BYTES"):
    """An input of type BYTES."""


class Fp32Input(Fp32[Flat[float]]):
    """The preprocessed input of the network, of the shape in the metadata of the model: [N, 3, height, width], …"""


class Uint8Input(Uint8[Flat[Byte]]):
    """Pixels that the server preprocesses: RGB, [N, height, width, 3], or grayscale, [N, height, width, 1]."""


class BytesInput(Bytes[Flat[str]]):
    """Image files, which the server decodes and preprocesses: [N] or [N, 1]. In JSON they are base64 or data URLs."""

    shape: ElementsShape


class OutputParameters(msgspec.Struct, frozen=True):
    """Parameters of an output. Classification and shared memory are extensions of Triton that are refused."""

    binary_data: bool | UnsetType = UNSET
    classification: msgspec.Raw | UnsetType = UNSET
    shared_memory_region: msgspec.Raw | UnsetType = UNSET


class Output(msgspec.Struct):
    """A requested output, `request_output` in the protocol."""

    name: OutputName
    parameters: OutputParameters = OutputParameters()


class RequestParameters(msgspec.Struct, frozen=True):
    """Parameters of a request. `binary_data_output` asks for outputs as binary data unless an output says otherwise."""

    binary_data_output: bool = False


class Request(msgspec.Struct, Generic[AnyInput]):
    """The body of an inference request, `inference_request` in the protocol."""

    inputs: Annotated[list[AnyInput], Meta(extra_json_schema={"minItems": 1, "maxItems": 1})]
    id: str | UnsetType = UNSET
    parameters: RequestParameters = RequestParameters()
    outputs: list[Output] = []


class InferenceRequest(Request[Fp32Input | Uint8Input | BytesInput]):
    """The body of an inference request."""


class ResponseParameters(msgspec.Struct):
    """Parameters of a returned output. `binary_data_size` is the number of bytes of its tensor after the JSON."""

    binary_data_size: int


class ResponseOutput(msgspec.Struct):
    """Logits or probabilities, `response_output` in the protocol. A number that is not finite is null."""

    name: OutputName
    datatype: Literal["FP32"]
    shape: tuple[int, ...]
    parameters: ResponseParameters | UnsetType = UNSET
    data: Sequence[float | None] | UnsetType = UNSET


class InferenceResponse(msgspec.Struct, kw_only=True):
    """The body of an inference response. `id` is that of the request."""

    model_name: str
    model_version: str
    id: str | UnsetType = UNSET
    outputs: list[ResponseOutput]


class ServerMetadata(msgspec.Struct, frozen=True):
    """The name and version of the server, and the protocol extensions that it supports."""

    name: str
    version: str
    extensions: tuple[str, ...]


class TensorMetadata(msgspec.Struct, frozen=True):
    """The name, data type and shape of a tensor. A dimension of -1 can have any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelParameters(msgspec.Struct, frozen=True):
    """What `assumption` says about the model was neither stated by its file nor by its user; it starts with ASSUMED."""

    assumption: str


class ModelMetadata(msgspec.Struct, frozen=True):
    """The tensors of a model. `platform` is its format and runtime, such as `onnx_onnxruntime`."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    parameters: ModelParameters | UnsetType = UNSET


class ServerLive(msgspec.Struct, frozen=True):
    """Whether the server is running."""

    live: bool


class ServerReady(msgspec.Struct, frozen=True):
    """Whether all models can answer requests."""

    ready: bool


class ModelReady(msgspec.Struct, frozen=True):
    """Whether a model can answer requests."""

    name: str
    ready: bool


AnyRequest: TypeAlias = Request[Input[list[Any]]]

# Typed down to the numbers, so that they are decoded and validated in one pass.
_DECODERS: Final[dict[bool, tuple[msgspec.json.Decoder[Any], ...]]] = {
    False: (
        msgspec.json.Decoder(InferenceRequest),
        msgspec.json.Decoder(Request[Fp32[Nested[float]] | Uint8[Nested[Byte]] | Bytes[list[list[str]]]]),
    ),
    True: (
        msgspec.json.Decoder(Request[Uint8Input | BytesInput]),
        msgspec.json.Decoder(Request[Uint8[Nested[Byte]] | Bytes[list[list[str]]]]),
    ),
}
"""The decoders for flat and for nested data, by whether pixels are the only numbers that are accepted."""


def decode_request(document: memoryview, uint8_only: bool) -> AnyRequest:
    """Decode an inference request whose data is a flat list, or lists nested four deep.

    Args:
        document: the JSON.
        uint8_only: whether pixels are the only numbers that are accepted.

    Raises:
        msgspec.DecodeError: the document is not JSON, or a field is missing or has the wrong type.
        UnicodeError: the document is not valid UTF-8.
        RecursionError: the document is nested too deeply.
    """
    flat, nested = _DECODERS[uint8_only]
    request: AnyRequest
    try:
        request = flat.decode(document)
    except msgspec.ValidationError as flat_error:
        try:
            request = nested.decode(document)
        except msgspec.ValidationError as nested_error:
            # Raise the error of the form that the client meant; only the error message depends on this guess.
            is_nested = "got `array` - at `$.inputs[0].data[0]`" in str(flat_error)
            raise (nested_error if is_nested else flat_error) from None
    return request
