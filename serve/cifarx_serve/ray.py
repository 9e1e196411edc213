"""Ray Serve: the interface of `cifarx serve`, answered by replicas that Ray places, counts and replaces.

    CIFARX_SERVE_FILES=lzh_9.onnx serve run cifarx_serve.ray:app

Ray accepts the connections and chooses a replica; a replica is what a worker of `cifarx serve` is: its own copy of the
models, its own queue, its own batches, its own figures.
"""

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from cifarx_serve.errors import UsageError
from cifarx_serve.images.reader import without_pillows_warnings
from cifarx_serve.server.app import create_app, prepare_process
from cifarx_serve.server.http.request import Message, Receive, Scope, Send
from cifarx_serve.server.settings import Count, Limits, Settings, served_names

try:
    import ray
    from ray import serve
except ModuleNotFoundError as error:
    raise UsageError("Ray Serve is not installed", 'pip install "cifarx[ray]"') from error

PREFIX: Final = "CIFARX_SERVE_"
"""Of the environment's variables: `CIFARX_SERVE_MAX_BATCH` is the argument `max_batch`."""

_DEFAULT: Final = Limits()
_NAME: Final = "cifarx"


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an application is told; the options of `cifarx serve` have the same names and meanings.

    Attributes:
        files: model files as every node finds them; in one string they are separated as the folders of PATH are.
    """

    files: str | list[str] = ""
    device: str = "auto"
    backend: str | None = None
    max_batch: Count = _DEFAULT.max_batch
    max_delay_us: Annotated[int, Meta(ge=0)] = _DEFAULT.max_delay_us
    max_queue: Count = _DEFAULT.max_queue
    deadline_ms: Count = round(_DEFAULT.deadline_s * 1000)
    max_body_mb: Count = _DEFAULT.max_body_bytes // 2**20
    max_pixels: Count = _DEFAULT.max_pixels
    max_images: Count = _DEFAULT.max_images
    api_key_file: str | None = None


class Replica:
    """One process of the deployment; Ray sends it requests once it is made.

    Args:
        settings: the same for all; how many threads it computes with is what Ray has given it.

    Raises:
        UsageError: the API keys cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        settings = msgspec.structs.replace(settings, threads=max(1, int(cpus)))
        prepare_process(settings)
        self._inside = ExitStack()
        self._inside.enter_context(without_pillows_warnings)
        self._composition = create_app(settings, None)  # Ray has a line in its log for every request
        self._opening = asyncio.create_task(self._composition.service.open())

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request of HTTP, as ASGI has it."""
        await self._composition.application(scope, receive, send)

    async def check_health(self) -> None:
        """Called by Ray before the first request, and from time to time; it replaces a replica that fails three times.

        Raises:
            CifarxError: a model cannot be opened.
            RuntimeError: a model answers nothing any more.
        """
        await self._opening
        service = self._composition.service
        if service.state == "failed" and not await service.probe():
            raise RuntimeError("a model has failed: the log of the replica has more")

    async def __del__(self) -> None:
        """Called by Ray once the requests are answered."""
        if not hasattr(self, "_composition"):  # it could not be made
            return
        self._opening.cancel()
        self._composition.service.draining = True
        await self._composition.service.close()
        self._composition.metrics.write()
        self._inside.close()


class Door:
    """The ASGI application that Ray is given: it leads to the replica of this process."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Paths are told from the application's prefix on; Ray puts the request's id into the answer itself."""
        if scope["type"] != "http":
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", "")) or "/"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            await send(message)

        await serve.get_replica_context().servable_object.answer({**scope, "path": path}, receive, answer)


def app(arguments: dict[str, Any]) -> "serve.Application":
    """What `serve run` and a configuration file name: `cifarx_serve.ray:app`.

    Args:
        arguments: those of `Arguments`; what is not given is read from the environment.

    Raises:
        UsageError: no file, or an argument that there is not.
    """
    settings = settings_of({**_environment(), **arguments})
    limits = settings.limits
    deployed = serve.deployment(
        name=_NAME,
        # Ray's own 5 would leave a batch no more than 5 requests. It is not `max_queue`: what is over it is refused by
        # the replica, in the words of the interface.
        max_ongoing_requests=limits.max_connections,
        graceful_shutdown_timeout_s=2 * limits.deadline_s,
    )
    return deployed(serve.ingress(Door())(Replica)).bind(settings)


def settings_of(arguments: dict[str, Any]) -> Settings:
    """What each replica is told; numbers may be text.

    Raises:
        UsageError: no file, or an argument that there is not.
    """
    try:
        given = msgspec.convert(arguments, Arguments, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(Arguments.__struct_fields__)
        raise UsageError(f"wrong arguments for Ray Serve ({error})", f"known are {known}, or {PREFIX}...") from error
    listed = given.files.split(os.pathsep) if isinstance(given.files, str) else given.files
    if not any(listed):
        raise UsageError("no file to serve", f"set {PREFIX}FILES, or give the argument files")
    return Settings(
        files=served_names([Path(file) for file in listed if file]),
        backend=given.backend,
        device=given.device,
        limits=Limits(
            max_batch=given.max_batch,
            max_delay_us=given.max_delay_us,
            max_queue=given.max_queue,
            deadline_s=given.deadline_ms / 1000,
            max_body_bytes=given.max_body_mb * 2**20,
            max_pixels=given.max_pixels,
            max_images=given.max_images,
        ),
        api_key_file=given.api_key_file and str(Path(given.api_key_file).absolute()),
    )


def _environment() -> dict[str, str]:
    return {name.removeprefix(PREFIX).lower(): value for name, value in os.environ.items() if name.startswith(PREFIX)}
