"""Collects all routes, and defines those for health checks, metrics, the API documentation and the web pages."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Final

from cifarx_serve.server.api.open_inference_routes import OpenInferenceRoutes
from cifarx_serve.server.api.openapi import JSON_TYPE, ok_response, openapi_document
from cifarx_serve.server.api.predict_routes import PredictRoutes
from cifarx_serve.server.api.schemas import StatusResponse
from cifarx_serve.server.api.triton_routes import TritonRoutes
from cifarx_serve.server.asgi import Body, Handler, Operation, Route
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.http.response import Response, json_response
from cifarx_serve.server.inference.deadline import ThreadPool
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.metrics import CONTENT_TYPE, Metrics
from cifarx_serve.server.inference.model_control import ModelControl
from cifarx_serve.server.inference.readiness import Readiness
from cifarx_serve.server.inference.repository import ModelRepository

_HTML: Final = b"text/html; charset=utf-8"
_PAGES: Final = Path(__file__).with_name("pages")

# Pages load nothing from other origins and send nothing to them; their styles and scripts are inline.
_CONTENT_SECURITY_POLICY: Final = (
    b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob: data:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_CACHED_ROOT_PATHS: Final = 8
"""A server has one root path, and another one for each prefix that its reverse proxies send."""

_READY_RESPONSES: Final = {
    **ok_response("All models can answer requests", StatusResponse),
    HTTPStatus.SERVICE_UNAVAILABLE: Body("A model cannot answer requests", {JSON_TYPE: StatusResponse}),
}


def create_routes(
    repository: ModelRepository,
    metrics: Metrics,
    decoder: ImageDecoder,
    threads: ThreadPool,
    control: ModelControl,
) -> list[Route]:
    """Return all routes of the server.

    Args:
        repository: the models.
        metrics: the metrics that `/metrics` returns.
        decoder: decodes the images of requests.
        threads: the threads that parse large requests.
        control: loads and unloads models.
    """
    readiness = Readiness(repository, decoder)
    routes = [
        *PredictRoutes(repository, decoder, threads).table(),
        *OpenInferenceRoutes(repository, readiness, decoder, threads).table(),
        *TritonRoutes(repository, metrics, control).table(),
        *_StatusRoutes(readiness, metrics).table(),
    ]

    @lru_cache(_CACHED_ROOT_PATHS)
    def document(root_path: str) -> bytes:
        return openapi_document(routes, root_path)

    async def openapi(request: Request) -> Response:
        return Response(document(request.root_path))

    return [
        *routes,
        Route("GET", "/openapi.json", openapi, None, public=True),
        Route("GET", "/", _page_handler("index.html"), None, public=True),
        Route("GET", "/docs", _page_handler("docs.html"), None, public=True),
    ]


class _StatusRoutes:
    """Health checks and metrics."""

    def __init__(self, readiness: Readiness, metrics: Metrics) -> None:
        self._readiness = readiness
        self._metrics = metrics
        self._metrics_thread = ThreadPoolExecutor(1, "metrics")  # nothing that a client sends runs in it

    def table(self) -> list[Route]:
        return [
            Route(
                "GET",
                "/healthz",
                self._healthz,
                Operation(
                    "healthz",
                    "Check that the process is running",
                    ok_response("The process is running", StatusResponse),
                ),
                public=True,
            ),
            Route(
                "GET",
                "/readyz",
                self._readyz,
                Operation(
                    "readyz",
                    "Check that all models can answer requests",
                    _READY_RESPONSES,
                    description="For load balancers: send no requests while the status is not 200.",
                ),
                public=True,
            ),
            Route(
                "GET",
                "/ping",
                self._readyz,
                Operation(
                    "ping",
                    "Check that all models can answer requests (Amazon SageMaker)",
                    _READY_RESPONSES,
                ),
                public=True,
            ),
            Route(
                "GET",
                "/metrics",
                self._metrics_page,
                Operation(
                    "metrics",
                    "Return the metrics of all workers for Prometheus",
                    {HTTPStatus.OK: Body("Prometheus's text format", {"text/plain": {"type": "string"}})},
                ),
            ),
        ]

    async def _healthz(self, request: Request) -> Response:  # noqa: ARG002
        return json_response(StatusResponse("alive"))

    async def _readyz(self, request: Request) -> Response:  # noqa: ARG002
        state = self._readiness.state
        status = HTTPStatus.OK if state == "ready" else HTTPStatus.SERVICE_UNAVAILABLE
        return json_response(StatusResponse(state), status)

    async def _metrics_page(self, request: Request) -> Response:  # noqa: ARG002
        self._metrics.flush()
        page = await asyncio.get_running_loop().run_in_executor(self._metrics_thread, self._metrics.render)
        return Response(page, content_type=CONTENT_TYPE.encode())


def _page_handler(name: str) -> Handler:
    async def handler(request: Request) -> Response:  # noqa: ARG001
        headers = ((b"content-security-policy", _CONTENT_SECURITY_POLICY),)
        return Response(_read_page(name), content_type=_HTML, headers=headers)

    return handler


@cache
def _read_page(name: str) -> bytes:
    return (_PAGES / name).read_bytes()
