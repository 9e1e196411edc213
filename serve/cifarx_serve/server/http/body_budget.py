"""The memory that the request bodies of one worker may use together."""

from http import HTTPStatus
from typing import Final

from cifarx_serve.server.errors import RequestError

MAX_BODIES: Final = 8
"""The budget in bodies of the maximum size. Without it, a thousand connections could each send one."""


class BodyBudget:
    """A number of bytes that requests acquire and release.

    Args:
        max_body_bytes: the maximum size of one body.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._available = MAX_BODIES * max_body_bytes

    def acquire(self, size: int) -> None:
        """Take `size` bytes from the budget.

        Raises:
            RequestError: fewer bytes are available (503).
        """
        if size > self._available:
            problem = f"no memory left for {size:,} more bytes of request bodies"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, problem, "try again in a second")
        self._available -= size

    def release(self, size: int) -> None:
        """Return `size` bytes to the budget."""
        self._available += size
