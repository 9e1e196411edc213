"""Receiving messages within limits."""

import asyncio

import grpc.aio
import pytest

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.grpc.call import Call
from cifarx_serve.server.grpc.receiver import _MAX_SLOW, _SLOW_S, MessageReceiver


class Context:
    """The context of a call whose message comes when a test sets it."""

    def __init__(self) -> None:
        self.message: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def read(self) -> object:
        return await self.message


def test_a_message_that_comes_in_time() -> None:
    async def run() -> None:
        context = Context()
        receiving = asyncio.ensure_future(MessageReceiver(5.0).receive(Call("/a/b", []), context))
        await asyncio.sleep(0.01)
        context.message.set_result(b"message")
        assert await receiving == b"message"

    asyncio.run(run())


def test_a_message_that_does_not_come() -> None:
    async def run() -> None:
        with pytest.raises(
            RequestError, match=r"the message was not received within 0\.\d+ s: send it faster"
        ) as raised:
            await MessageReceiver(0.05).receive(Call("/a/b", []), Context())
        assert raised.value.status == 408

    asyncio.run(run())


def test_no_message() -> None:
    """If the call is cancelled soon afterwards, gRPC has rejected the message."""

    async def run() -> None:
        context, call = Context(), Call("/a/b", [])
        context.message.set_result(grpc.aio.EOF)
        with pytest.raises(RequestError, match="the call has no message: send one"):
            await MessageReceiver(5.0).receive(call, context)
        assert not call.too_large
        receiving = asyncio.ensure_future(MessageReceiver(5.0).receive(call, context))
        await asyncio.sleep(0.01)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        assert call.too_large

    asyncio.run(run())


def test_too_many_slow_messages() -> None:
    """The slowest call makes room for a new one; calls that are not slow stay."""

    async def run() -> None:
        receiver = MessageReceiver(60.0)
        contexts = [Context() for _ in range(_MAX_SLOW + 3)]
        calls = [asyncio.ensure_future(receiver.receive(Call("/a/b", []), context)) for context in contexts]
        await asyncio.sleep(0.05)
        assert not any(call.done() for call in calls)
        await asyncio.sleep(_SLOW_S)
        last = Context()
        receiving = asyncio.ensure_future(receiver.receive(Call("/a/b", []), last))
        await asyncio.sleep(0.05)
        assert [call.done() for call in calls] == [True] * 3 + [False] * _MAX_SLOW
        for call in calls[:3]:
            with pytest.raises(RequestError, match=r"the message was not received within 1\.\d+ s"):
                await call
        for context in (*contexts[3:], last):
            context.message.set_result(b"message")
        assert await asyncio.gather(*calls[3:], receiving) == [b"message"] * (_MAX_SLOW + 1)

    asyncio.run(run())
