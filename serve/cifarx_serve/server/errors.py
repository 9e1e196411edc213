"""A request that is answered with an error, and how."""

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
"""What the metrics call each status."""

CLIENT_CLOSED_REQUEST: Final = 499
"""What the log has for a request that nobody waited for; it is never sent."""


class ClientDisconnect(Exception):
    """Nobody waits for the answer."""


class RequestError(CifarxError):
    """What a client did wrong, or what the server cannot do for it now.

    Args:
        status: HTTP's.
        problem: what was wrong, naming the value.
        remedy: how to mend it.
        headers: of the answer, beside those of every answer with this status.
    """

    def __init__(
        self, status: HTTPStatus, problem: str, remedy: str, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(problem, remedy)
        self.status = status
        self.headers = headers
