"""A client that calls the server's ASGI application directly, without a network."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from cifarx_serve.server.api.errors import to_http_error
from cifarx_serve.server.api.routes import create_routes
from cifarx_serve.server.asgi import Application, Route
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.http.request import Message, Scope
from cifarx_serve.server.inference.deadline import ThreadPool
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model_control import ModelControl
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.settings import Limits, Settings

if TYPE_CHECKING:
    from cifarx_serve.server.tracing.tracer import RequestTracer


class Response(NamedTuple):
    """A response; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, which must be one JSON document."""
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The error message of the body, which must hold nothing else."""
        assert list(self.json) == ["error"]
        error = self.json["error"]
        assert isinstance(error, str)
        assert ": " in error
        return error


class AsgiClient:
    """Sends requests to an application; the connection stays open after the body, until `disconnected` is set."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.disconnected = asyncio.Event()
        self.sent: list[Message] = []

    @property
    def repository(self) -> ModelRepository:
        return self.app.repository

    @property
    def metrics(self) -> Metrics:
        return self.app.metrics

    async def request(
        self,
        method: str,
        target: str,
        body: bytes | list[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        content_length: bool = True,
    ) -> Response:
        """Send one request; a list is a body in parts, `content_length` whether the request states its length."""
        self.sent = []
        scope = _scope(method, target, body, headers or {}, content_length)
        await self.app(scope, self._receive(body), self._send)
        start, end = self.sent
        assert start["type"] == "http.response.start"
        assert end == {"type": "http.response.body", "body": end["body"]}
        pairs = [(name.decode(), value.decode()) for name, value in start["headers"]]
        response = Response(start["status"], dict(pairs), end["body"])
        assert int(response.headers["content-length"]) == len(response.body)
        return response

    async def get(self, target: str, **headers: str) -> Response:
        """Send a GET request, as in `get("/v1/models", x_api_key="…")`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.request("GET", target, headers=named)

    async def post(self, target: str, body: bytes | list[bytes], content_type: str | None = None) -> Response:
        """Send a POST request with a body."""
        headers = {} if content_type is None else {"content-type": content_type}
        return await self.request("POST", target, body, headers)

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def _receive(self, body: bytes | list[bytes]) -> Any:
        parts = list(body) if isinstance(body, list) else [body]

        async def receive() -> Message:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await self.disconnected.wait()
            return {"type": "http.disconnect"}

        return receive


def _scope(
    method: str, target: str, body: bytes | list[bytes], headers: Mapping[str, str], content_length: bool
) -> Scope:
    path, _, query = target.partition("?")
    size = len(b"".join(body) if isinstance(body, list) else body)
    all_headers = {"content-length": str(size), **headers} if content_length and size else headers
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in all_headers.items()],
        "client": ("127.0.0.1", 54321),
    }


@asynccontextmanager
async def open_client(
    files: Mapping[str, Path],
    limits: Limits | None = None,
    *,
    routes: list[Route] | None = None,
    api_key_file: Path | None = None,
    access_log: AccessLog | None = None,
    cors_origin: str | None = None,
    root_path: str = "",
    trusted_proxies: tuple[str, ...] = (),
    tracer: "RequestTracer | None" = None,
    open_models: bool = True,
) -> AsyncIterator[AsgiClient]:
    """Open a client of an application in this event loop, with its models open; `routes` replaces the server's own."""
    paths = {name: str(path) for name, path in files.items()}
    settings = Settings(
        files=paths,
        device="cpu",
        limits=limits or Limits(),
        cors_origin=cors_origin,
        root_path=root_path,
        trusted_proxies=trusted_proxies,
    )
    metrics = Metrics()
    repository = ModelRepository(settings, metrics)
    with closing(ImageDecoder(1, settings.limits.max_pixels)) as decoder, closing(ThreadPool(1, "parse")) as threads:
        control = ModelControl(repository)
        table = create_routes(repository, metrics, decoder, threads, control) if routes is None else routes
        api_keys = ApiKeys(api_key_file) if api_key_file else None
        app = Application(repository, metrics, table, to_http_error, api_keys, access_log, tracer)
        if open_models:
            await repository.open()
        try:
            yield AsgiClient(app)
        finally:
            await repository.close()


def run_with_client(test: Callable[[AsgiClient], Awaitable[None]], *paths: Path, **options: Any) -> None:
    """Run a test with a client of these model files; `options` are those of `Limits` and of `open_client`."""
    limits = {name: options.pop(name) for name in list(options) if name in Limits.__struct_fields__}

    async def run() -> None:
        files = {path.stem: path for path in paths}
        async with open_client(files, Limits(**{"max_batch": 4, **limits}), **options) as client:
            await test(client)

    asyncio.run(run())


def encode_image(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """Return the image as the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()
