"""Counts the fields of a protobuf message before it is parsed.

An empty submessage takes two bytes on the wire and eighty in memory. A message of the maximum size could therefore take
gigabytes, but it would need millions of fields, and a request of the protocol has few.

Source: "Encoding" in the documentation of Protocol Buffers.
"""

from http import HTTPStatus
from typing import Final

from cifarx_serve.server.errors import RequestError

_MAX_FIELDS: Final = 4096
"""The maximum number of fields of a message and of its submessages. Numbers in packed form are one field."""

_MAX_UNCOUNTED_BYTES: Final = 64 * 1024
"""Messages up to this size are not counted: they cannot take much memory."""

_NESTED_FIELDS: Final = frozenset({4, 5, 6})
"""The fields of ModelInferRequest that are messages: parameters, inputs and outputs. Tensor data is not in here."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}


def require_few_fields(raw: bytes) -> None:
    """Check the number of fields of a message and, for inference requests, of those in it.

    What is malformed is left to the parser.

    Raises:
        RequestError: there are too many, or one is of a type that proto3 does not have, such as a group (400).
    """
    if len(raw) <= _MAX_UNCOUNTED_BYTES:
        return
    left = _MAX_FIELDS
    spans = [(0, len(raw), True)]
    while spans:
        position, end, is_outer = spans.pop()
        while position < end:
            left -= 1
            if left < 0:
                problem = f"the message of {len(raw):,} bytes has more than {_MAX_FIELDS} fields"
                raise RequestError(HTTPStatus.BAD_REQUEST, problem, "send numbers as raw_input_contents, or packed")
            tag, position = _read_varint(raw, position, end)
            wire_type = tag & 7
            if wire_type == _VARINT:
                _, position = _read_varint(raw, position, end)
            elif wire_type in _FIXED_SIZES:
                position += _FIXED_SIZES[wire_type]
            elif wire_type == _LENGTH:
                size, position = _read_varint(raw, position, end)
                if is_outer and tag >> 3 in _NESTED_FIELDS:
                    spans.append((position, min(position + size, end), False))
                position += size
            else:
                problem = f"the message has a field of wire type {wire_type}"
                raise RequestError(HTTPStatus.BAD_REQUEST, problem, "send it in the encoding of proto3")


def _read_varint(raw: bytes, position: int, end: int) -> tuple[int, int]:
    """Return a varint and the position after it; what is cut off reads as the end."""
    value = shift = 0
    while position < end:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            break
    return 0, end
