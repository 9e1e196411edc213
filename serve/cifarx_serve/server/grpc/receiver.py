"""Receives the messages of calls that have one, within limits on the time and on the memory."""

import asyncio
from http import HTTPStatus
from typing import Any, Final

import grpc.aio

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.grpc.call import Call

_REJECTION_S: Final = 0.05
"""How long after a missing message gRPC may cancel the call. It then has rejected the message as too large."""

_SLOW_S: Final = 1.0
"""How long a message may take before the call counts as slow."""

_MAX_SLOW: Final = 64
"""How many slow calls there may be: gRPC keeps what it has of their messages in memory."""


class MessageReceiver:
    """Receives messages. Use it in one event loop.

    Args:
        timeout_s: the time limit for a message, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._receiving: dict[asyncio.Timeout, float] = {}  # when each began, the oldest first

    async def receive(self, call: Call, context: Any) -> bytes:
        """Return the message of a call.

        Raises:
            RequestError: it was not received in time, or is slow and too many others are (408); or there is none (400).
        """
        message = await self._read(context)
        if message is grpc.aio.EOF:
            call.too_large = True
            await asyncio.sleep(_REJECTION_S)
            call.too_large = False
            raise RequestError(HTTPStatus.BAD_REQUEST, "the call has no message", "send one")
        return bytes(message)

    async def _read(self, context: Any) -> Any:
        started_at = asyncio.get_running_loop().time()
        timeout = asyncio.timeout_at(started_at + self._timeout_s)
        self._receiving[timeout] = started_at
        if len(self._receiving) > _MAX_SLOW:
            self._end_slow(started_at)
        try:
            async with timeout:
                return await context.read()
        except TimeoutError as error:
            seconds = asyncio.get_running_loop().time() - started_at
            problem = f"the message was not received within {seconds:.3g} s"
            raise RequestError(HTTPStatus.REQUEST_TIMEOUT, problem, "send it faster, or send less") from error
        finally:
            del self._receiving[timeout]

    def _end_slow(self, now: float) -> None:
        """End the slowest calls if there are too many."""
        slow = [timeout for timeout, started_at in self._receiving.items() if now - started_at > _SLOW_S]
        for timeout in slow[: max(0, len(slow) - _MAX_SLOW)]:
            timeout.reschedule(now)
