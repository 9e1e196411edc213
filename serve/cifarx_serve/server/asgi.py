"""The ASGI application: routes, and what holds for every request: its id, its key, its errors, its line in the log."""

import os
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final, NamedTuple, TypeAlias

import msgspec

from cifarx_serve.server.api.schemas import ErrorAnswer
from cifarx_serve.server.errors import CAUSES, CLIENT_CLOSED_REQUEST, ClientDisconnect, RequestError
from cifarx_serve.server.http.access_log import AccessLog, AccessRecord
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.request import JSON, Receive, Request, Response, Scope, Send
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelRepository

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

_SECURITY: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_CORS_METHODS: Final = b"GET, POST, OPTIONS"
_CORS_HEADERS: Final = b"authorization, content-type, inference-header-content-length, x-api-key, x-request-id"
_CORS_EXPOSED: Final = b"inference-header-content-length, retry-after, x-request-id"
_RETRY_AFTER: Final = (b"retry-after", b"1")
_UNKNOWN: Final = "unknown"
_PREFLIGHT: Final = "preflight"
_ALLOWED: Final = Response(b"", HTTPStatus.NO_CONTENT)


class Route(NamedTuple):
    """What answers a path.

    Attributes:
        template: the path, with `{name}` for a part that varies.
        open: whether it needs no API key.
    """

    method: str
    template: str
    handler: Handler
    open: bool = False


class Application:
    """Called by an ASGI server for every request.

    Args:
        service: the models.
        metrics: counts the requests.
        routes: what there is.
        keys: who may ask; None for everybody.
        log: has a line for every request; None for none.
    """

    def __init__(
        self,
        service: ModelRepository,
        metrics: Metrics,
        routes: list[Route],
        keys: ApiKeys | None,
        log: AccessLog | None,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._keys = keys
        self._held = BodyBudget(service.settings.limits.max_body_bytes)
        self._log = log
        self._fixed: dict[str, dict[str, Route]] = {}
        self._varying: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        for template in dict.fromkeys(route.template for route in routes):
            methods = {route.method: route for route in routes if route.template == template}
            if "{" in template:
                pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", template)
                self._varying.append((re.compile(pattern), methods))
            else:
                self._fixed[template] = methods
        self._always = _SECURITY if (origin := service.settings.cors_origin) is None else (*_SECURITY, *_cors(origin))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive, self._service.settings.limits, self._held)
        template, cause = _UNKNOWN, None
        try:
            methods = self._fixed.get(request.path) or self._match(request)
            preflight = request.method == "OPTIONS" and self._service.settings.cors_origin is not None
            template = _PREFLIGHT if preflight else next(iter(methods.values())).template
            response = _ALLOWED if preflight else await self._respond(request, methods)
        except RequestError as error:
            response, cause = _error(error), CAUSES[error.status]
        except ClientDisconnect:
            response, cause = Response(b"", CLIENT_CLOSED_REQUEST), "client_left"
        except Exception as error:
            response, cause = _defect(error), CAUSES[HTTPStatus.INTERNAL_SERVER_ERROR]
        finally:
            request.release()
        if response.status != CLIENT_CLOSED_REQUEST:
            await self._send(request, response, send)
        seconds = time.perf_counter() - request.arrived
        self._metrics.request(template, response.status, seconds, cause)
        self._write(request, response, seconds, cause)

    async def _respond(self, request: Request, methods: dict[str, Route]) -> Response:
        """What one of a path's routes answers.

        Raises:
            RequestError: another method (405), no key (401), or what the route raises.
        """
        method = "GET" if request.method == "HEAD" else request.method
        route = methods.get(method)
        if route is None:
            known = ", ".join(sorted({*methods, "HEAD"} if "GET" in methods else methods))
            problem, headers = f"{request.method[:20]} of this path", ((b"allow", known.encode()),)
            raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, problem, f"it has {known}", headers)
        if self._keys is not None and not route.open and not self._keys.allow(request.headers):
            problem = "no API key, or a wrong one"
            raise RequestError(HTTPStatus.UNAUTHORIZED, problem, "send Authorization: Bearer KEY")
        return await route.handler(request)

    def _match(self, request: Request) -> dict[str, Route]:
        """Raises RequestError (404) where there is no such path."""
        for pattern, methods in self._varying:
            if found := pattern.fullmatch(request.path):
                request.parameters = found.groupdict()
                return methods
        problem = f"no path {request.path[:80]!r}"
        raise RequestError(HTTPStatus.NOT_FOUND, problem, "see /docs for those that there are")

    async def _send(self, request: Request, response: Response, send: Send) -> None:
        headers = [
            (b"content-type", response.content_type),
            (b"content-length", str(len(response.body)).encode()),
            (b"x-request-id", request.id.encode()),
            *self._always,
            *response.headers,
        ]
        if self._service.draining:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": int(response.status), "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    def _write(self, request: Request, response: Response, seconds: float, cause: str | None) -> None:
        if self._log is None:
            return
        client = request.scope.get("client")
        self._log.write(
            AccessRecord(
                time=datetime.now(UTC),
                id=request.id,
                client=client[0] if client else "",
                method=request.method,
                path=request.path,
                status=int(response.status),
                ms=round(seconds * 1e3, 3),
                bytes=len(response.body),
                worker=os.getpid(),
                cause=cause,
            )
        )


def _cors(origin: str) -> tuple[tuple[bytes, bytes], ...]:
    return (
        (b"access-control-allow-origin", origin.encode()),
        (b"access-control-allow-methods", _CORS_METHODS),
        (b"access-control-allow-headers", _CORS_HEADERS),
        (b"access-control-expose-headers", _CORS_EXPOSED),
        (b"vary", b"origin"),
    )


def error_body(problem: str) -> bytes:
    """An error as every route words it."""
    return msgspec.json.encode(ErrorAnswer(problem))


def _error(error: RequestError) -> Response:
    headers = list(error.headers)
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append(_RETRY_AFTER)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        headers.append((b"connection", b"close"))  # what is left of the body is not worth reading
    return Response(error_body(str(error)), error.status, JSON, tuple(headers))


def _defect(error: Exception) -> Response:
    """What no input should bring about: told to who runs the server, not to who asked."""
    import sys
    import traceback

    traceback.print_exception(error, file=sys.stderr)
    return Response(error_body("a defect of the server: its log has more"), HTTPStatus.INTERNAL_SERVER_ERROR)
