"""The server's application, asked without a network: by ASGI's scope, receive and send."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cifarx_serve.server.api.routes import Routes
from cifarx_serve.server.asgi import Application, Route
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.http.request import Message, Scope
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.settings import Limits, Settings


class Answer(NamedTuple):
    """What was sent back; the names of headers are in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as the one JSON document it must be."""
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The body as an error, and nothing else."""
        assert list(self.json) == ["error"]
        error = self.json["error"]
        assert isinstance(error, str)
        assert ": " in error
        return error


class Client:
    """Asks an application; the connection stays open after the body, until `left` is set."""

    def __init__(self, application: Application, service: ModelRepository, metrics: Metrics) -> None:
        self.application = application
        self.service = service
        self.metrics = metrics
        self.left = asyncio.Event()
        self.sent: list[Message] = []

    async def ask(
        self,
        method: str,
        target: str,
        body: bytes | list[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        stated: bool = True,
    ) -> Answer:
        """One request; a list is a body in parts, `stated` whether its length is told."""
        self.sent = []
        await self.application(_scope(method, target, body, headers or {}, stated), self._receive(body), self._send)
        start, end = self.sent
        assert start["type"] == "http.response.start"
        assert end == {"type": "http.response.body", "body": end["body"]}
        pairs = [(name.decode(), value.decode()) for name, value in start["headers"]]
        answer = Answer(start["status"], dict(pairs), end["body"])
        assert int(answer.headers["content-length"]) == len(answer.body)
        return answer

    async def get(self, target: str, **headers: str) -> Answer:
        """`get("/v1/models", x_api_key="…")`."""
        return await self.ask("GET", target, headers={name.replace("_", "-"): text for name, text in headers.items()})

    async def post(self, target: str, body: bytes | list[bytes], content_type: str | None = None) -> Answer:
        """A body of a type."""
        return await self.ask("POST", target, body, {} if content_type is None else {"content-type": content_type})

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def _receive(self, body: bytes | list[bytes]) -> Any:
        parts = list(body) if isinstance(body, list) else [body]

        async def receive() -> Message:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await self.left.wait()
            return {"type": "http.disconnect"}

        return receive


def _scope(method: str, target: str, body: bytes | list[bytes], headers: Mapping[str, str], stated: bool) -> Scope:
    path, _, query = target.partition("?")
    size = len(b"".join(body) if isinstance(body, list) else body)
    given = {"content-length": str(size), **headers} if stated and size else headers
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
        "client": ("127.0.0.1", 54321),
    }


@asynccontextmanager
async def application(
    files: Mapping[str, Path],
    limits: Limits | None = None,
    *,
    routes: list[Route] | None = None,
    keys: Path | None = None,
    log: AccessLog | None = None,
    cors_origin: str | None = None,
    open_models: bool = True,
) -> AsyncIterator[Client]:
    """A server's application with its models open, in this event loop; `routes` in place of its own."""
    named = {name: str(path) for name, path in files.items()}
    settings = Settings(files=named, device="cpu", limits=limits or Limits(), cors_origin=cors_origin)
    metrics = Metrics()
    service = ModelRepository(settings, metrics)
    with ThreadPoolExecutor(1) as pool:
        table = Routes(service, metrics, pool).table() if routes is None else routes
        app = Application(service, metrics, table, ApiKeys(keys) if keys else None, log)
        if open_models:
            await service.open()
        try:
            yield Client(app, service, metrics)
        finally:
            await service.close()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
