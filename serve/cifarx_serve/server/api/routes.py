"""What the server answers: its own interface, the Open Inference Protocol, health, metrics and pages."""

import asyncio
import re
import time
from collections import defaultdict
from concurrent.futures import Executor
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import ImageError
from cifarx_serve.server.api.open_inference import (
    InferRequest,
    infer_response,
    model_metadata,
    parse_infer,
    server_metadata,
)
from cifarx_serve.server.api.openapi import openapi_document
from cifarx_serve.server.api.schemas import ImageAnswer, ModelsAnswer, PredictAnswer, StateAnswer, Timing
from cifarx_serve.server.api.uploads import decode, refusal, uploads
from cifarx_serve.server.asgi import Route
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import Upload
from cifarx_serve.server.http.request import JSON, Request, Response, json_response
from cifarx_serve.server.inference.metrics import CONTENT_TYPE, Metrics
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository
from cifarx_serve.system.versions import package_version

_HTML: Final = b"text/html; charset=utf-8"
_BINARY: Final = b"application/octet-stream"
_PAGES: Final = Path(__file__).with_name("pages")

# Nothing from elsewhere, nothing sent elsewhere; the page's own style and script are in the page.
_POLICY: Final = (
    b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob: data:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_TOP_K: Final = 5
_HEADER_LENGTH: Final = b"inference-header-content-length"

_QUICK_JSON: Final = 256 * 1024
"""Bytes of a tensor as JSON that are read at once; more are read in a thread."""


class Routes:
    """The handlers.

    Args:
        service: the models.
        metrics: what `/metrics` shows.
        pool: large images and documents are read there.
    """

    def __init__(self, service: ModelRepository, metrics: Metrics, pool: Executor) -> None:
        self._service = service
        self._metrics = metrics
        self._pool = pool

    def table(self) -> list[Route]:
        """Every route there is."""
        routes = [
            Route("POST", "/v1/predict", self._predict),
            Route("GET", "/v1/models", self._models),
            Route("GET", "/v2", self._server, open=True),
            Route("GET", "/v2/health/live", self._alive, open=True),
            Route("GET", "/v2/health/ready", self._ready, open=True),
            Route("GET", "/healthz", self._alive, open=True),
            Route("GET", "/readyz", self._ready, open=True),
            Route("GET", "/metrics", self._figures),
            Route("GET", "/openapi.json", self._document, open=True),
            Route("GET", "/", self._page, open=True),
            Route("GET", "/docs", self._page, open=True),
        ]
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route("GET", model, self._model),
                Route("GET", f"{model}/ready", self._model_ready),
                Route("POST", f"{model}/infer", self._infer),
            ]
        return routes

    async def _predict(self, request: Request) -> Response:
        query = _fields(request.query(), ("model", "top_k"))
        with self._service.serving(query.get("model")) as serving:
            top_k = _top_k(query.get("top_k"), len(serving.model.spec.class_names))
            return await self._classify(request, serving, top_k)

    async def _classify(self, request: Request, serving: ModelInstance, top_k: int) -> Response:
        sent = uploads(request, await request.body())
        serving.require_room(len(sent))  # before the work of decoding: what is refused should cost little
        started = time.perf_counter()
        read = await self._read_all(sent, serving, request)
        decoded = time.perf_counter()
        answers, queued_s, computed_s = await self._answers(read, serving, request, top_k)
        named = [
            _image_answer(upload, pixels if isinstance(pixels, ImageError) else answers[position])
            for position, (upload, pixels) in enumerate(zip(sent, read, strict=True))
        ]
        spent = (decoded - started, queued_s, computed_s, time.perf_counter() - request.arrived)
        timing = Timing(*(round(seconds * 1e6) for seconds in spent))
        return json_response(PredictAnswer(serving.model.name, serving.model.version, named, timing))

    async def _read_all(
        self, sent: list[Upload], serving: ModelInstance, request: Request
    ) -> list[NDArray[np.uint8] | ImageError]:
        """Pictures that the model resizes are all held at a time: then the limit is that of their pixels together."""
        spec, left = serving.model.spec, self._service.settings.limits.max_pixels
        read: list[NDArray[np.uint8] | ImageError] = []
        for upload in sent:
            try:
                pixels = await decode(upload, spec, left, request, self._pool)
            except ImageError as error:
                read.append(error)
            else:
                read.append(pixels)
                left -= pixels.size // 3 if spec.embedded_preprocessing else 0
        return read

    async def _answers(
        self, read: list[NDArray[np.uint8] | ImageError], serving: ModelInstance, request: Request, top_k: int
    ) -> tuple[dict[int, Any], float, float]:
        """Predictions by position, and the longest wait and work; images of one size go together."""
        sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position, pixels in enumerate(read):
            if not isinstance(pixels, ImageError):
                sizes[pixels.shape].append(position)
        if not sizes:
            raise refusal(next(error for error in read if isinstance(error, ImageError)))
        groups = list(sizes.values())
        asked = [serving.answer(_batch([read[position] for position in group]), request) for group in groups]
        given = [await asked[0]] if len(asked) == 1 else await asyncio.gather(*asked)
        names = serving.model.spec.class_names
        found: dict[int, Any] = {}
        for group, answer in zip(groups, given, strict=True):
            found.update(zip(group, answer.predictions(names, top_k), strict=True))
        return found, max(answer.queued_s for answer in given), max(answer.computed_s for answer in given)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002
        return json_response(ModelsAnswer([serving.model.record() for serving in self._service.servings]))

    async def _server(self, request: Request) -> Response:  # noqa: ARG002
        return json_response(server_metadata(package_version()))

    async def _alive(self, request: Request) -> Response:
        return json_response(StateAnswer("alive") if request.path == "/healthz" else {"live": True})

    async def _ready(self, request: Request) -> Response:
        state = self._service.state
        status = HTTPStatus.OK if state == "ready" else HTTPStatus.SERVICE_UNAVAILABLE
        return json_response(StateAnswer(state) if request.path == "/readyz" else {"ready": state == "ready"}, status)

    async def _figures(self, request: Request) -> Response:  # noqa: ARG002
        self._metrics.write()
        page = await asyncio.get_running_loop().run_in_executor(self._pool, self._metrics.page)
        return Response(page, content_type=CONTENT_TYPE.encode())

    async def _document(self, request: Request) -> Response:  # noqa: ARG002
        return Response(openapi_document())

    async def _page(self, request: Request) -> Response:
        name = "index.html" if request.path == "/" else "docs.html"
        return Response(_page(name), content_type=_HTML, headers=((b"content-security-policy", _POLICY),))

    async def _model(self, request: Request) -> Response:
        model = self._versioned(request).model
        return json_response(model_metadata(model.name, [model.version], model.platform, model.spec))

    async def _model_ready(self, request: Request) -> Response:
        model = self._versioned(request).model
        ready = not (model.failed or self._service.draining)
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return json_response({"name": model.name, "ready": ready}, status)

    async def _infer(self, request: Request) -> Response:
        with self._versioned(request) as serving:
            infer = await self._tensor(request, serving)
            answer = await serving.answer(infer.tensor, request)
        document, length = infer_response(infer, serving.model.name, serving.model.version, answer.logits)
        if length is None:
            return Response(document, content_type=JSON)
        return Response(document, content_type=_BINARY, headers=((_HEADER_LENGTH, str(length).encode()),))

    async def _tensor(self, request: Request, serving: ModelInstance) -> InferRequest:
        body, length = await request.body(), _header_length(request)
        limits = self._service.settings.limits
        asked = (body, length, serving.model.spec, limits.max_images, limits.max_pixels)
        if (len(body) if length is None else length) <= _QUICK_JSON:
            return parse_infer(*asked)
        return await request.run_in_threadpool(self._pool, parse_infer, *asked)

    def _versioned(self, request: Request) -> ModelInstance:
        """The model of the path.

        Raises:
            RequestError: no such model or version (404), or it is not yet open (503).
        """
        serving = self._service.serving(request.parameters["model"])
        version = request.parameters.get("version", serving.model.version)
        if version != serving.model.version:
            problem = f"no version {version[:80]!r} of model {serving.model.name}"
            raise RequestError(HTTPStatus.NOT_FOUND, problem, f"it is served in version {serving.model.version}")
        return serving


def _image_answer(upload: Upload, found: Any) -> ImageAnswer:
    if isinstance(found, ImageError):
        return ImageAnswer(upload.name, error=str(found))
    return ImageAnswer(upload.name, found.label, found.index, found.score, found.top)


def _batch(images: list[Any]) -> NDArray[np.uint8]:
    return images[0][None] if len(images) == 1 else np.stack(images)


def _fields(query: dict[str, str], known: tuple[str, ...]) -> dict[str, str]:
    if other := [name for name in query if name not in known]:
        problem = f"unknown field {other[0][:80]!r} in the query"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, f"known are {', '.join(known)}")
    return query


def _top_k(given: str | None, classes: int) -> int:
    if given is None:
        return min(_TOP_K, classes)
    if not re.fullmatch("[0-9]{1,6}", given) or not 1 <= int(given) <= classes:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"top_k is {given[:20]!r}", f"give a number from 1 to {classes}")
    return int(given)


def _header_length(request: Request) -> int | None:
    given = request.headers.get(_HEADER_LENGTH)
    if given is None:
        return None
    given = given.strip()
    if not re.fullmatch(rb"[0-9]{1,12}", given):
        problem = f"Inference-Header-Content-Length is {given[:20].decode('latin-1')!r}"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, "give the bytes of the JSON before the tensors")
    return int(given)


@cache
def _page(name: str) -> bytes:
    return (_PAGES / name).read_bytes()
