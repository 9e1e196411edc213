"""The spans of HTTP requests, with the names and attributes of OpenTelemetry's semantic conventions for HTTP servers.

https://opentelemetry.io/docs/specs/semconv/http/http-spans/
"""

import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from cifarx_serve.server.http.request import Request

if TYPE_CHECKING:
    from cifarx_serve.server.tracing.tracer import RequestTracer

_UNTRACED: Final = frozenset({"/healthz", "/readyz", "/ping", "/metrics", "/v2/health/live", "/v2/health/ready"})
"""The paths of probes and of Prometheus: these requests are many, and say nothing."""

_METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_OTHER: Final = "_OTHER"
_MAX_LENGTH: Final = 1000


def start_span(tracer: "RequestTracer", request: Request) -> None:
    """Start the span of a request, unless it is that of a probe."""
    if request.path in _UNTRACED:
        return
    scope = request.scope
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers.items()}
    method = request.method if request.method in _METHODS else _OTHER
    attributes = {
        "http.request.method": method,
        "url.path": f"{request.root_path}{request.path}"[:_MAX_LENGTH],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
        "cifarx.request.id": request.id,
    }
    if method == _OTHER:
        attributes["http.request.method_original"] = request.method[:_MAX_LENGTH]
    if query := scope["query_string"]:
        attributes["url.query"] = query.decode("latin-1")[:_MAX_LENGTH]
    if client := scope.get("client"):
        attributes["client.address"] = client[0]
    if agent := headers.get("user-agent"):
        attributes["user_agent.original"] = agent[:_MAX_LENGTH]
    request.span = tracer.start(method, request.received_at, headers, attributes)


def end_span(request: Request, route: str | None, status: int, body_bytes: int, cause: str | None) -> None:
    """End the span of a request that was answered.

    Args:
        request: the request.
        route: the path of its route; None if it has none.
        status: the status of the response.
        body_bytes: the size of its body.
        cause: the cause of an error.
    """
    if request.span is None:
        return
    method = request.method if request.method in _METHODS else "HTTP"
    attributes: dict[str, str | int] = {"http.response.status_code": status, "http.response.body.size": body_bytes}
    if route is not None:
        attributes["http.route"] = route
    error = cause if status >= HTTPStatus.INTERNAL_SERVER_ERROR else None
    request.span.end(f"{method} {route}" if route else method, attributes, error, time.perf_counter())
