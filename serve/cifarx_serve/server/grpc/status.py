"""The gRPC status of every error, and its cause in the metrics."""

import sys
import traceback
from http import HTTPStatus
from typing import Final, NamedTuple

from grpc import StatusCode

from cifarx_serve.errors import CifarxError
from cifarx_serve.server.api.errors import to_http_error
from cifarx_serve.server.errors import CAUSES, ClientDisconnect, RequestError

_CODES: Final = {
    HTTPStatus.BAD_REQUEST: StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: StatusCode.UNAUTHENTICATED,
    HTTPStatus.NOT_FOUND: StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_TIMEOUT: StatusCode.DEADLINE_EXCEEDED,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.SERVICE_UNAVAILABLE: StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: StatusCode.DEADLINE_EXCEEDED,
}
"""The code for each HTTP status that a request of this protocol can have."""

_CLIENT_LEFT: Final = "client_left"


class Unimplemented(CifarxError):
    """A method that this server does not have."""


class Status(NamedTuple):
    """How a call ended.

    Attributes:
        code: the code.
        message: what is wrong, and how to fix it; empty if nothing is.
        cause: the cause in the metrics and in the access log; None if nothing is wrong.
    """

    code: StatusCode
    message: str = ""
    cause: str | None = None


OK: Final = Status(StatusCode.OK)

CANCELLED: Final = Status(StatusCode.CANCELLED, "the client has cancelled the call", _CLIENT_LEFT)

TOO_LARGE: Final = Status(
    StatusCode.RESOURCE_EXHAUSTED, "the message is too large", CAUSES[HTTPStatus.REQUEST_ENTITY_TOO_LARGE]
)

CLIENT_DEADLINE: Final = Status(
    StatusCode.DEADLINE_EXCEEDED, "the deadline of the client has passed", CAUSES[HTTPStatus.GATEWAY_TIMEOUT]
)


def error_status(error: Exception) -> Status:
    """Return the status of a call that failed. An unexpected exception is logged."""
    if isinstance(error, Unimplemented):
        return Status(StatusCode.UNIMPLEMENTED, str(error), CAUSES[HTTPStatus.NOT_FOUND])
    http_error = to_http_error(error)
    if isinstance(http_error, ClientDisconnect):
        return CANCELLED
    if isinstance(http_error, RequestError) and (code := _CODES.get(http_error.status)):
        return Status(code, str(http_error), CAUSES[http_error.status])
    traceback.print_exception(error, file=sys.stderr)
    message = "internal server error: see the log of the server"
    return Status(StatusCode.INTERNAL, message, CAUSES[HTTPStatus.INTERNAL_SERVER_ERROR])
