"""Responses of the application, and the JSON body of an error."""

from http import HTTPStatus
from typing import Any, Final, NamedTuple

import msgspec

JSON: Final = b"application/json"


class Response(NamedTuple):
    """What a route handler returns."""

    body: bytes
    status: int = HTTPStatus.OK
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


class ErrorResponse(msgspec.Struct, frozen=True):
    """The body of every error response: what is wrong, and how to fix it."""

    error: str


def json_response(value: Any, status: int = HTTPStatus.OK) -> Response:
    """Return a response with `value` as one JSON document. NaN and infinity become null."""
    return Response(msgspec.json.encode(value), status)


def error_body(message: str) -> bytes:
    """Return an error message as JSON."""
    return msgspec.json.encode(ErrorResponse(message))
