"""The JSON of an inference request and its response, as the Open Inference Protocol has it.

Fields and parameters that are not named here are ignored; all else is checked while it is read.
"""

from typing import Annotated, Any, Final, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

Size: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Byte: TypeAlias = Annotated[int, Meta(ge=0, le=255)]

Number = TypeVar("Number")
Data = TypeVar("Data")
AnyInput = TypeVar("AnyInput")

Flat: TypeAlias = list[Number]
Nested: TypeAlias = list[list[list[list[Number]]]]


class InputParameters(msgspec.Struct, frozen=True):
    """Of the binary tensor data extension."""

    binary_data_size: Size | UnsetType = UNSET


class Input(msgspec.Struct, Generic[Data], tag_field="datatype"):
    """The protocol's request_input; its data type is the class."""

    name: str
    shape: list[Size]
    parameters: InputParameters = InputParameters()
    data: Data | UnsetType = UNSET


class Fp32(Input[Data], Generic[Data], tag="FP32"):
    """An input of float32."""


class Uint8(Input[Data], Generic[Data], tag="UINT8"):
    """An input of bytes."""


class OutputParameters(msgspec.Struct, frozen=True):
    """Of the binary tensor data extension, and two of Triton's others: what they ask for must not go unheard."""

    binary_data: bool | UnsetType = UNSET
    classification: msgspec.Raw | UnsetType = UNSET
    shared_memory_region: msgspec.Raw | UnsetType = UNSET


class Output(msgspec.Struct):
    """The protocol's request_output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(msgspec.Struct, frozen=True):
    """Of the binary tensor data extension."""

    binary_data_output: bool = False


class Request(msgspec.Struct, Generic[AnyInput]):
    """The protocol's inference_request."""

    inputs: list[AnyInput]
    id: str | UnsetType = UNSET
    parameters: RequestParameters = RequestParameters()
    outputs: list[Output] = []


class ResponseParameters(msgspec.Struct):
    """Of the binary tensor data extension."""

    binary_data_size: int


class ResponseOutput(msgspec.Struct):
    """The protocol's response_output."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: ResponseParameters | UnsetType = UNSET
    data: list[float] | UnsetType = UNSET


class Response(msgspec.Struct):
    """The protocol's inference_response."""

    model_name: str
    model_version: str
    id: str | UnsetType
    outputs: list[ResponseOutput]


AnyRequest: TypeAlias = Request[Input[list[Any]]]

# Typed down to the element: one pass reads the numbers and checks them.
_DECODERS: Final[dict[bool, tuple[msgspec.json.Decoder[Any], ...]]] = {
    False: (
        msgspec.json.Decoder(Request[Fp32[Flat[float]] | Uint8[Flat[Byte]]]),
        msgspec.json.Decoder(Request[Fp32[Nested[float]] | Uint8[Nested[Byte]]]),
    ),
    True: (
        msgspec.json.Decoder(Request[Uint8[Flat[Byte]]]),
        msgspec.json.Decoder(Request[Uint8[Nested[Byte]]]),
    ),
}
"""For flat and for nested data, by whether pixels alone are taken."""


def decode_request(document: memoryview, pixels_only: bool) -> AnyRequest:
    """Read an inference request whose data is a flat list, or lists of lists four deep.

    Args:
        document: the JSON.
        pixels_only: whether UINT8 is the only data type.

    Raises:
        msgspec.DecodeError: it is no JSON, or a field is missing or of the wrong type.
        UnicodeError: it holds bytes that are no UTF-8.
        RecursionError: its brackets are nested too deep.
    """
    flat, nested = _DECODERS[pixels_only]
    request: AnyRequest
    try:
        request = flat.decode(document)
    except msgspec.ValidationError as flat_error:
        try:
            request = nested.decode(document)
        except msgspec.ValidationError as nested_error:
            # Which of them tells what is wrong; no more than the words of the answer hang on it.
            meant_nested = "got `array` - at `$.inputs[0].data[0]`" in str(flat_error)
            raise (nested_error if meant_nested else flat_error) from None
    return request
