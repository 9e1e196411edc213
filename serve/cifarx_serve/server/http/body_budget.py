"""The memory that the bodies of all requests of a worker take together."""

from http import HTTPStatus
from typing import Final

from cifarx_serve.server.errors import RequestError

BODIES: Final = 8
"""So many of the largest bodies may be held at a time; a thousand connections could send a thousand."""


class BodyBudget:
    """Bytes that may still be held.

    Args:
        max_body_bytes: of one request.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._left = BODIES * max_body_bytes

    def take(self, size: int) -> None:
        """Hold so many more bytes.

        Raises:
            RequestError: there is no room for them now (503).
        """
        if size > self._left:
            problem = f"no room for {size:,} bytes beside the bodies of other requests"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, problem, "try again in a second")
        self._left -= size

    def give_back(self, size: int) -> None:
        """What was taken before."""
        self._left += size
