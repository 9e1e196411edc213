"""The ASGI application: routing, and what every request has in common, from API keys and errors to the access log."""

import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from cifarx_serve.errors import UsageError
from cifarx_serve.server.errors import CAUSES, CLIENT_CLOSED_REQUEST, ClientDisconnect, RequestError, RouteNotFound
from cifarx_serve.server.http.access_log import AccessLog, AccessRecord
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.compression import compress_response
from cifarx_serve.server.http.forwarded import TrustedProxies
from cifarx_serve.server.http.request import Receive, Request, Scope, Send
from cifarx_serve.server.http.response import JSON, Response, error_body
from cifarx_serve.server.http.span_attributes import end_span, start_span
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.tracing.trace_context import TRACEPARENT, TRACERESPONSE, parse_trace_id
from cifarx_serve.system.terminal import printable

if TYPE_CHECKING:
    from cifarx_serve.server.tracing.tracer import RequestTracer

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_CORS_METHODS: Final = b"GET, POST, OPTIONS"
_CORS_HEADERS: Final = (
    b"authorization, content-type, inference-header-content-length, traceparent, tracestate, x-api-key, x-request-id"
)
_CORS_EXPOSED_HEADERS: Final = b"inference-header-content-length, retry-after, traceresponse, x-request-id"
_RETRY_AFTER: Final = (b"retry-after", b"1")

_UNKNOWN: Final = "unknown"
"""The route in the metrics of a request to a path without a route."""

_PREFLIGHT: Final = "preflight"
"""The route in the metrics of a CORS preflight request."""

_PREFLIGHT_RESPONSE: Final = Response(b"", HTTPStatus.NO_CONTENT)


class Parameter(NamedTuple):
    """A parameter of an operation; `schema` is a JSON Schema."""

    name: str
    location: Literal["path", "query", "header"]
    schema: Mapping[str, Any]
    description: str


class Body(NamedTuple):
    """The body of a request or response: for each media type a msgspec struct or a JSON Schema."""

    description: str
    content: Mapping[str, Any]


class Operation(NamedTuple):
    """The documentation of a route, from which the OpenAPI document is generated.

    Attributes:
        id: the `operationId`, unique among all operations.
        summary: what the operation does, in one line.
        responses: the body of the response by status. The 401 of routes that require an API key is added to them.
        description: more about the operation, if there is more to say.
        parameters: the parameters of the path, the query string and the headers.
        request: the body of the request, if it takes one.
    """

    id: str
    summary: str
    responses: Mapping[HTTPStatus, Body]
    description: str | None = None
    parameters: Sequence[Parameter] = ()
    request: Body | None = None


class Route(NamedTuple):
    """A method and a path, and the function that handles them.

    Attributes:
        path: the path; `{name}` is a placeholder for one segment.
        handler: takes the request and returns the response.
        operation: the documentation of the route; None for web pages, which are not part of the API.
        public: whether the route requires no API key.
    """

    method: str
    path: str
    handler: Handler
    operation: Operation | None
    public: bool = False


class Application:
    """The ASGI application; an ASGI server calls it once per request.

    Args:
        repository: the models; it is not opened here.
        metrics: counts the requests.
        routes: the routes.
        to_http_error: converts an exception of a handler to RequestError or ClientDisconnect if it stands for one, and
            returns any other exception as it is.
        api_keys: the accepted API keys; None if no key is required.
        access_log: receives one record per request; None for no log.
        tracer: records a trace of every request; None to record none.

    Raises:
        UsageError: the root path of the settings is the start of a route.
    """

    def __init__(
        self,
        repository: ModelRepository,
        metrics: Metrics,
        routes: list[Route],
        to_http_error: Callable[[Exception], Exception],
        api_keys: ApiKeys | None,
        access_log: AccessLog | None,
        tracer: "RequestTracer | None" = None,
    ) -> None:
        self.repository = repository
        self.metrics = metrics
        self._limits = repository.settings.limits
        self._cors_origin = repository.settings.cors_origin
        self._to_http_error = to_http_error
        self._api_keys = api_keys
        self._access_log = access_log
        self._tracer = tracer
        self._body_budget = BodyBudget(self._limits.max_body_bytes)
        self._root_path = _require_no_route(repository.settings.root_path, routes)
        trusted = repository.settings.trusted_proxies
        self._trusted_proxies = TrustedProxies(trusted) if trusted else None
        self._static_routes: dict[str, dict[str, Route]] = {}
        self._dynamic_routes: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        for path in dict.fromkeys(route.path for route in routes):
            methods = {route.method: route for route in routes if route.path == path}
            if "{" in path:
                pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path)
                self._dynamic_routes.append((re.compile(pattern), methods))
            else:
                self._static_routes[path] = methods
        origin = self._cors_origin
        self._common_headers = _SECURITY_HEADERS if origin is None else (*_SECURITY_HEADERS, *_cors_headers(origin))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive, self._limits, self._body_budget)
        route, cause = _UNKNOWN, None
        try:
            if self._root_path:
                request.mount(self._root_path)
            if self._trusted_proxies is not None:
                self._trusted_proxies.apply(request)
            if self._tracer is not None:
                start_span(self._tracer, request)
            methods = self._static_routes.get(request.path) or self._match(request)
            is_preflight = request.method == "OPTIONS" and self._cors_origin is not None
            route = _PREFLIGHT if is_preflight else next(iter(methods.values())).path
            response = _PREFLIGHT_RESPONSE if is_preflight else await self._dispatch(request, methods)
        except Exception as error:
            response, cause = _error_response(self._to_http_error(error))
        finally:
            request.release_body()
        if request.method == "POST" and (accepted := request.headers.get(b"accept-encoding")):
            response = await compress_response(response, accepted)
        if response.status != CLIENT_CLOSED_REQUEST:
            await self._send(request, response, send)
        seconds = time.perf_counter() - request.received_at
        self.metrics.observe_request(route, response.status, seconds, cause)
        self._log_request(request, response, seconds, cause)
        if self._tracer is not None:
            matched = None if route in (_UNKNOWN, _PREFLIGHT) else route
            end_span(request, matched, response.status, len(response.body), cause)

    async def _dispatch(self, request: Request, methods: dict[str, Route]) -> Response:
        """Call the handler for the method of the request.

        Raises:
            RequestError: the path does not support the method (405), the API key is missing or invalid (401), or
                whatever the handler raises.
        """
        method = "GET" if request.method == "HEAD" else request.method
        route = methods.get(method)
        if route is None:
            allowed = ", ".join(sorted({*methods, "HEAD"} if "GET" in methods else methods))
            problem, headers = f"method {request.method[:20]} is not allowed here", ((b"allow", allowed.encode()),)
            raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, problem, f"use {allowed}", headers)
        if self._api_keys is not None and not route.public and not self._api_keys.authenticate(request.headers):
            problem = "missing or invalid API key"
            raise RequestError(HTTPStatus.UNAUTHORIZED, problem, "send Authorization: Bearer KEY")
        return await route.handler(request)

    def _match(self, request: Request) -> dict[str, Route]:
        """Return the routes of a path with placeholders, or of the root path itself, and set the path parameters.

        Raises:
            RouteNotFound: no route matches the path.
        """
        if not request.path and request.root_path:
            return _ROOT_REDIRECT
        for pattern, methods in self._dynamic_routes:
            if match := pattern.fullmatch(request.path):
                request.path_params = match.groupdict()
                return methods
        raise RouteNotFound(request.path)

    async def _send(self, request: Request, response: Response, send: Send) -> None:
        headers = [
            (b"content-type", response.content_type),
            (b"content-length", str(len(response.body)).encode()),
            (b"x-request-id", request.id.encode()),
            *self._common_headers,
            *response.headers,
        ]
        if request.span is not None:
            headers.append((TRACERESPONSE, request.span.traceresponse))
        if self.repository.draining:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": int(response.status), "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    def _log_request(self, request: Request, response: Response, seconds: float, cause: str | None) -> None:
        if self._access_log is None:
            return
        client, span = request.scope.get("client"), request.span
        self._access_log.write(
            AccessRecord(
                time=datetime.now(UTC),
                id=request.id,
                client=client[0] if client else "",
                method=request.method,
                path=request.path if request.path.isascii() else printable(request.path),
                status=int(response.status),
                ms=round(seconds * 1e3, 3),
                bytes=len(response.body),
                worker=os.getpid(),
                cause=cause,
                trace=span.trace_id if span is not None else parse_trace_id(request.headers.get(TRACEPARENT)),
            )
        )


def _require_no_route(root_path: str, routes: Sequence[Route]) -> str:
    """Return a root path after checking that no route starts with it: whether a path includes it would be unclear.

    Raises:
        UsageError: a route does.
    """
    first = root_path.split("/")[1:2]
    if any(route.path.split("/")[1:2] == first for route in routes):
        raise UsageError(f"--root-path {root_path} starts like a route of the server", "choose another prefix")
    return root_path


async def _redirect_to_root(request: Request) -> Response:
    """Redirect from the root path itself to its first page, whose links are relative."""
    location = f"{request.root_path}/".encode()
    return Response(b"", HTTPStatus.TEMPORARY_REDIRECT, headers=((b"location", location),))


_ROOT_REDIRECT: Final = {"GET": Route("GET", "/", _redirect_to_root, None, public=True)}


def _cors_headers(origin: str) -> tuple[tuple[bytes, bytes], ...]:
    return (
        (b"access-control-allow-origin", origin.encode()),
        (b"access-control-allow-methods", _CORS_METHODS),
        (b"access-control-allow-headers", _CORS_HEADERS),
        (b"access-control-expose-headers", _CORS_EXPOSED_HEADERS),
        (b"vary", b"origin"),
    )


def _error_response(error: Exception) -> tuple[Response, str]:
    """Return the response to a request whose handler raised an exception, and the cause for the metrics."""
    if isinstance(error, RequestError):
        return _request_error(error), CAUSES[error.status]
    if isinstance(error, ClientDisconnect):
        return Response(b"", CLIENT_CLOSED_REQUEST), "client_left"
    return _internal_error(error), CAUSES[HTTPStatus.INTERNAL_SERVER_ERROR]


def _request_error(error: RequestError) -> Response:
    headers = list(error.headers)
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append(_RETRY_AFTER)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return Response(error_body(str(error)), error.status, JSON, tuple(headers))


def _internal_error(error: Exception) -> Response:
    """Log an unexpected exception; return 500."""
    import sys
    import traceback

    traceback.print_exception(error, file=sys.stderr)
    return Response(error_body("internal server error: see the log of the server"), HTTPStatus.INTERNAL_SERVER_ERROR)
