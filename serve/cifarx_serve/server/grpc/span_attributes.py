"""The spans of gRPC calls, with the names and attributes of OpenTelemetry's semantic conventions for gRPC servers.

https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
"""

import time
from typing import TYPE_CHECKING, Final

import grpc

from cifarx_serve.server.grpc.call import Call
from cifarx_serve.server.grpc.status import Status

if TYPE_CHECKING:
    from cifarx_serve.server.tracing.tracer import RequestTracer

_SERVER_ERRORS: Final = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
)
"""The codes that the conventions count as errors of a server."""


def start_span(tracer: "RequestTracer", call: Call) -> None:
    """Start the span of a call, or of one request of a stream."""
    service, _, method = call.method.lstrip("/").rpartition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "cifarx.request.id": call.id}
    headers = {key: value for key, value in call.metadata if isinstance(value, str)}
    call.span = tracer.start(call.method.lstrip("/"), call.started_at, headers, attributes)


def end_span(call: Call, status: Status, client: str) -> None:
    """End the span of a call, if it has one.

    Args:
        call: the call.
        status: how it ended.
        client: the address of the client.
    """
    if call.span is None:
        return
    attributes = {"rpc.grpc.status_code": status.code.value[0], "client.address": client}
    error = status.code.name if status.code in _SERVER_ERRORS else None
    call.span.end(call.method.lstrip("/"), attributes, error, time.perf_counter())
