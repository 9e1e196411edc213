"""What every call has in common: API keys, limits, errors, metrics and the access log."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import grpc

from cifarx_serve.server.errors import ClientDisconnect, RequestError
from cifarx_serve.server.grpc.call import REQUEST_ID, Call, client_address
from cifarx_serve.server.grpc.receiver import MessageReceiver
from cifarx_serve.server.grpc.span_attributes import end_span, start_span
from cifarx_serve.server.grpc.status import (
    CANCELLED,
    CLIENT_DEADLINE,
    OK,
    TOO_LARGE,
    Status,
    Unimplemented,
    error_status,
)
from cifarx_serve.server.http.access_log import AccessLog, AccessRecord
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.forwarded import TrustedProxies
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.settings import Limits
from cifarx_serve.server.tracing.trace_context import TRACEPARENT, TRACERESPONSE, parse_trace_id
from cifarx_serve.system.terminal import printable

if TYPE_CHECKING:
    from cifarx_serve.server.tracing.tracer import RequestTracer

UnaryHandler: TypeAlias = Callable[[bytes, Call], Awaitable[bytes]]

_UNKNOWN: Final = "unknown"
"""The route in the metrics of a call of an unknown method."""

_PROTOCOL: Final = "gRPC"
"""Stands for the HTTP method in the access log."""

_GRACE_S: Final = 0.5
"""How long a stream stays open for a request that is already on its way when the server is shut down."""

_TRANSFER_S: Final = 0.05
"""How much later than at the client the deadline of a call may pass here, because its request took time to arrive."""

_ROUNDING: Final = 0.01
"""The largest share by which gRPC rounds up the timeout that a client sends: 1.001 s becomes 1.01 s."""


class Stream:
    """A call with several messages.

    Attributes:
        call: the call.
    """

    def __init__(self, call: Call, context: Any, handlers: "Handlers") -> None:
        self.call = call
        self._context = context
        self._handlers = handlers

    async def receive(self) -> bytes | None:
        """Return the next message; None if the client sends no more.

        Raises:
            RequestError: the server is shut down (503).
        """
        reading = asyncio.ensure_future(self._context.read())
        draining = asyncio.ensure_future(self._handlers.draining.wait())
        try:
            await asyncio.wait({reading, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await asyncio.wait({reading}, timeout=_GRACE_S)
            if not reading.done():
                raise shutting_down()
            message = reading.result()
        finally:
            reading.cancel()
            draining.cancel()
        return None if message is grpc.aio.EOF else message

    async def send(self, message: bytes) -> None:
        """Send a message.

        Raises:
            ClientDisconnect: the client has left.
        """
        try:
            await self._context.write(message)
        except grpc.aio.BaseError as error:
            raise ClientDisconnect from error

    async def answer(self, message: bytes, handler: UnaryHandler, error_message: Callable[[Status], bytes]) -> bytes:
        """Return the answer to one request of several, which is counted and logged like a call.

        Args:
            message: the request.
            handler: answers it.
            error_message: returns the answer to a request that failed, from its status.
        """
        call, status = self.call.of_stream(), OK
        self._handlers.start_span(call)
        try:
            return await self._handlers.answer(call, message, handler)
        except asyncio.CancelledError:
            call.cancelled = True
            status = _cancellation_status(self.call, self._context)
            raise
        except Exception as error:
            status = error_status(error)
            return error_message(status)
        finally:
            self._handlers.record(call, status, self._context.peer)

    async def wait_for_drain(self, timeout_s: float) -> bool:
        """Wait until the server is shut down, for this long at most; return whether it is."""
        try:
            await asyncio.wait_for(self._handlers.draining.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


StreamHandler: TypeAlias = Callable[[Stream], Awaitable[None]]


class Method(NamedTuple):
    """A method of a service.

    Attributes:
        unary: takes the only message of the call, and returns the only answer.
        stream: answers a call with several messages; one of the two is set.
        public: whether the method requires no API key. A unary one also answers when the limit of calls is reached.
    """

    unary: UnaryHandler | None = None
    stream: StreamHandler | None = None
    public: bool = False


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handles all calls of a server.

    Args:
        methods: the methods by their full name.
        limits: the limits of the server.
        metrics: counts the calls.
        api_keys: the accepted API keys; None if no key is required.
        access_log: receives one record per call, or per request of a stream; None for no log.
        trusted_proxies: the proxies that name the clients of their calls; None for none.
        tracer: records a trace of every call, or of every request of a stream; None to record none.

    Attributes:
        draining: is set when the server is shut down, so that streams end.
        last_active_at: when a call began or ended, on the clock of `time.perf_counter`.
        active: the number of calls now.
    """

    def __init__(
        self,
        methods: dict[str, Method],
        limits: Limits,
        metrics: Metrics,
        api_keys: ApiKeys | None,
        access_log: AccessLog | None,
        trusted_proxies: TrustedProxies | None = None,
        tracer: "RequestTracer | None" = None,
    ) -> None:
        self._methods = methods
        self._limits = limits
        self._metrics = metrics
        self._api_keys = api_keys
        self._access_log = access_log
        self._trusted_proxies = trusted_proxies
        self._tracer = tracer
        self._budget = BodyBudget(limits.max_body_bytes)
        self._receiver = MessageReceiver(limits.body_timeout_s)
        self.draining = asyncio.Event()
        self.active = 0
        self.last_active_at = 0.0

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        """Return the handler of a call. gRPC calls this when the call arrives, before its first message."""
        call = Call(handler_call_details.method, handler_call_details.invocation_metadata)
        method = self._methods.get(call.method)
        if method is not None and method.stream is not None:
            stream = method.stream

            async def handle_stream(_: Any, context: Any) -> None:
                await self._handle(call, method, context, lambda: stream(Stream(call, context, self)))

            return grpc.stream_stream_rpc_method_handler(handle_stream)

        async def handle(_: Any, context: Any) -> bytes:
            # Not a unary method for gRPC, which waits without a time limit for the message of one.
            response: bytes = await self._handle(call, method, context, lambda: self._answer(call, method, context))
            return response

        return grpc.stream_unary_rpc_method_handler(handle)

    async def _handle(
        self, call: Call, method: Method | None, context: Any, answer: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Return the answer of a call, and record it."""
        status = OK
        self.active += 1
        self.last_active_at = call.started_at
        call.set_time_remaining(context.time_remaining())
        if method is not None and method.unary is not None and not method.public:
            self.start_span(call)
        context.set_trailing_metadata(((REQUEST_ID, call.id), *_trace_metadata(call)))
        try:
            self._admit(call, method)
            return await answer()
        except asyncio.CancelledError:
            call.cancelled = True
            status = _cancellation_status(call, context)
            raise
        except Exception as error:
            status = error_status(error)
        finally:
            self.active -= 1
            self.last_active_at = time.perf_counter()
            if _is_counted(method, status):
                self.record(call, status, context.peer)
        return await context.abort(status.code, status.message)

    async def _answer(self, call: Call, method: Method | None, context: Any) -> bytes:
        if method is None or method.unary is None:
            raise Unimplemented(f"unknown method {call.method[:120]}", "see the reflection service for the methods")
        return await self.answer(call, await self._receiver.receive(call, context), method.unary)

    async def answer(self, call: Call, message: bytes, handler: UnaryHandler) -> bytes:
        """Return the answer to a message, within the memory for messages.

        Raises:
            RequestError: the memory is used up (503).
            Exception: whatever the handler raises.
        """
        self._budget.acquire(len(message))
        try:
            response = await handler(message, call)
        finally:
            self._budget.release(len(message))
        call.response_bytes = len(response)
        return response

    def start_span(self, call: Call) -> None:
        """Start the span of a call, or of a request of a stream, if traces are recorded."""
        if self._tracer is not None:
            start_span(self._tracer, call)

    def _admit(self, call: Call, method: Method | None) -> None:
        """Check the API key and the number of calls.

        Raises:
            RequestError: the key is missing or invalid (401), or there are too many calls (503).
        """
        call.authenticated = self._api_keys is None or self._api_keys.authenticate(call.headers())
        if method is None or not method.public:
            call.require_key()
        elif method.unary is not None:
            return
        if self.active > self._limits.max_connections:
            problem = f"{self.active - 1} calls are open"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, problem, "try again in a second")

    def record(self, call: Call, status: Status, peer: Callable[[], str]) -> None:
        """Count a call that has ended, and write it to the access log."""
        seconds = time.perf_counter() - call.started_at
        route = call.method if call.method in self._methods else _UNKNOWN
        self._metrics.observe_request(route, status.code.name, seconds, status.cause)
        if self._access_log is None and call.span is None:
            return
        client = client_address(peer())
        if self._trusted_proxies is not None:
            client = self._trusted_proxies.client(client, call.metadata_values("x-forwarded-for"))
        end_span(call, status, client)
        if self._access_log is None:
            return
        traceparent = next(iter(call.metadata_values(TRACEPARENT.decode())), "").encode("latin-1", "replace")
        self._access_log.write(
            AccessRecord(
                time=datetime.now(UTC),
                id=call.id,
                client=client,
                method=_PROTOCOL,
                path=call.method if call.method.isascii() else printable(call.method),
                status=status.code.name,
                ms=round(seconds * 1e3, 3),
                bytes=call.response_bytes,
                worker=os.getpid(),
                cause=status.cause,
                trace=call.span.trace_id if call.span is not None else parse_trace_id(traceparent),
            )
        )


def _trace_metadata(call: Call) -> tuple[tuple[str, str], ...]:
    return () if call.span is None else ((TRACERESPONSE.decode(), call.span.traceresponse.decode()),)


def _cancellation_status(call: Call, context: Any) -> Status:
    if call.too_large:
        return TOO_LARGE
    return CLIENT_DEADLINE if _deadline_has_passed(call, context.time_remaining()) else CANCELLED


def _deadline_has_passed(call: Call, time_remaining_s: float | None) -> bool:
    """Return whether the client has ended a call because of its deadline, which looks like a cancellation.

    The client's deadline passes before that of the server, which starts when the request arrives, with a timeout that
    gRPC has rounded up (`timeout_encoding.cc` of gRPC).
    """
    if time_remaining_s is None or call.client_timeout_s is None:
        return False
    return time_remaining_s <= _TRANSFER_S + _ROUNDING * call.client_timeout_s


def _is_counted(method: Method | None, status: Status) -> bool:
    """Return whether a call is counted: a stream is if it failed, because its requests are counted one by one."""
    return method is None or method.stream is None or status not in (OK, CANCELLED)


def shutting_down() -> RequestError:
    """Return the error that ends a stream when the server is shut down."""
    problem = "the server is shutting down"
    return RequestError(HTTPStatus.SERVICE_UNAVAILABLE, problem, "open another stream, which reaches another server")
