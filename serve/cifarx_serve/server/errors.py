"""Errors of HTTP requests, and their names in the metrics and in the access log."""

from http import HTTPStatus
from typing import Final

from cifarx_serve.errors import CifarxError

CAUSES: Final = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.UNAUTHORIZED: "unauthorized",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "slow_client",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_type",
    HTTPStatus.INTERNAL_SERVER_ERROR: "internal",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded",
    HTTPStatus.GATEWAY_TIMEOUT: "deadline",
}
"""The cause that the metrics and the access log name for each status."""

CLIENT_CLOSED_REQUEST: Final = 499
"""The status in the access log of a request whose client disconnected. It is never sent. The number is nginx's."""


class ClientDisconnect(Exception):
    """The client closed the connection before it was sent a response."""


class RouteNotFound(Exception):
    """No route matches the path of a request.

    Args:
        path: the path.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class RequestError(CifarxError):
    """A request that is answered with an error status.

    Args:
        status: the HTTP status, one of `CAUSES`.
        problem: what is wrong, with the value.
        remedy: how to fix it.
        headers: headers of the response, in addition to those of every response with this status.
    """

    def __init__(
        self, status: HTTPStatus, problem: str, remedy: str, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(problem, remedy)
        self.status = status
        self.headers = headers
