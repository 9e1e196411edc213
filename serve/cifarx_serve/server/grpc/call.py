"""A call, or one request of a stream, as the services see it."""

import random
import re
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.inference.deadline import Deadline

if TYPE_CHECKING:
    from cifarx_serve.server.tracing.request_span import RequestSpan

REQUEST_ID: Final = "x-request-id"
"""The key of the request's ID in the metadata."""

# An ID is copied into the trailing metadata and into the access log, so only visible ASCII characters are accepted.
_REQUEST_ID: Final = re.compile("[!-~]{1,128}")

_RANDOM: Final = random.Random()
"""Generates request IDs, which are not secret; seeded by the operating system in each process."""


class Call:
    """A call.

    Args:
        method: the full name of its method, such as `/inference.GRPCInferenceService/ModelInfer`.
        metadata: the client's metadata.

    Attributes:
        started_at: when the call arrived, on the clock of `time.perf_counter`.
        id: the `x-request-id` of the client if it is valid, otherwise a random one.
        authenticated: whether the client has sent a valid API key, or needs none.
        cancelled: whether the client has cancelled the call, or has disconnected.
        too_large: whether gRPC may be rejecting the message because of its size.
        client_timeout_s: the time that the client allows from `started_at` on, in seconds; None if it sets no limit.
        response_bytes: the size of the answer.
        span: the span of the call, if traces are recorded.
    """

    __slots__ = (
        "authenticated",
        "cancelled",
        "client_timeout_s",
        "id",
        "metadata",
        "method",
        "response_bytes",
        "span",
        "started_at",
        "too_large",
    )

    def __init__(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self.started_at = time.perf_counter()
        self.method = method
        self.metadata = metadata
        client_id = next((value for key, value in metadata if key == REQUEST_ID), None)
        is_valid = isinstance(client_id, str) and _REQUEST_ID.fullmatch(client_id)
        self.id = client_id if isinstance(client_id, str) and is_valid else f"{_RANDOM.getrandbits(128):032x}"
        self.authenticated = False
        self.cancelled = False
        self.too_large = False
        self.client_timeout_s: float | None = None
        self.response_bytes = 0
        self.span: RequestSpan | None = None

    def of_stream(self) -> "Call":
        """Return a call for one of several requests of this one, which is a stream. It starts now."""
        call = Call(self.method, self.metadata)
        call.authenticated = self.authenticated
        if self.client_timeout_s is not None:
            call.client_timeout_s = max(0.0, self.started_at + self.client_timeout_s - call.started_at)
        return call

    def set_time_remaining(self, seconds: float | None) -> None:
        """Set the time that the client allows from now on."""
        if seconds is not None:
            self.client_timeout_s = time.perf_counter() - self.started_at + seconds

    def deadline(self, limit_s: float) -> Deadline:
        """Return the deadline: the server's limit, or that of the client if it is shorter."""
        if self.client_timeout_s is None:
            return Deadline(self.started_at, limit_s)
        return Deadline(self.started_at, min(limit_s, self.client_timeout_s))

    def require_key(self) -> None:
        """Check that the client has sent a valid API key, if one is required.

        Raises:
            RequestError: it has not (401).
        """
        if not self.authenticated:
            problem = "missing or invalid API key"
            raise RequestError(HTTPStatus.UNAUTHORIZED, problem, "send the metadata authorization: Bearer KEY")

    def is_disconnected(self) -> bool:
        """Return whether the client waits for no answer any more."""
        return self.cancelled

    def metadata_values(self, key: str) -> list[str]:
        """Return the values of a key in the metadata."""
        return [value for name, value in self.metadata if name == key and isinstance(value, str)]

    def headers(self) -> dict[bytes, bytes]:
        """Return the metadata as HTTP headers."""
        return {
            key.encode(): value.encode("latin-1", "replace") if isinstance(value, str) else value
            for key, value in self.metadata
        }


def client_address(peer: str) -> str:
    """Return the IP address of a peer as gRPC names it: `ipv4:127.0.0.1:50000`, or `ipv6:%5B::1%5D:50000`."""
    _, _, address = unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]")
