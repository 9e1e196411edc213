"""A Ray Serve application with the HTTP API of `cifarx serve`; Ray places, scales and replaces its replicas.

    CIFARX_SERVE_FILES=lzh_9.onnx serve run cifarx_serve.ray:app

Ray accepts the connections and routes each request to a replica. A replica is like a worker of `cifarx serve`: it has
its own models, queues and metrics.
"""

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final, cast

import msgspec
from msgspec import Meta

from cifarx_serve.errors import UsageError
from cifarx_serve.images.reader import suppress_pillow_warnings
from cifarx_serve.server.app import configure_process, create_app, create_components
from cifarx_serve.server.http.request import Message, Receive, Scope, Send
from cifarx_serve.server.model_files import absolute_path, absolute_paths, files_by_name
from cifarx_serve.server.settings import Settings, limit_options, limits_from_options

try:
    import ray
    from ray import serve
except ModuleNotFoundError as error:
    raise UsageError("Ray Serve is not installed", 'pip install "cifarx[ray]"') from error

ENV_PREFIX: Final = "CIFARX_SERVE_"
"""The prefix of environment variables with arguments: `CIFARX_SERVE_MAX_BATCH` is the argument `max_batch`."""

_NAME: Final = "cifarx"


class _Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    files: str | list[str] = ""
    device: str = "auto"
    backend: str | None = None
    api_key_file: str | None = None


# Ray accepts the connections, so their number is no limit of a replica.
_LIMIT_OPTIONS: Final = [option for option in limit_options() if option.field != "max_connections"]

Arguments: Final = cast(
    type[_Arguments],
    msgspec.defstruct(
        "Arguments",
        [(option.name, Annotated[int, Meta(ge=option.minimum)], option.default) for option in _LIMIT_OPTIONS],
        bases=(_Arguments,),
        frozen=True,
        kw_only=True,
    ),
)
"""The arguments of an application: the options of `cifarx serve` with the same names, defaults and meanings.

`files` are paths that exist on every node: a list, or one string separated like the directories of PATH.
"""


class Replica:
    """A process of the deployment.

    Args:
        settings: the settings of all replicas. The number of threads is that of the CPUs that Ray assigned.

    Raises:
        UsageError: the file of the API keys cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        settings = msgspec.structs.replace(settings, threads=max(1, int(cpus)))
        configure_process(settings)
        self._exit_stack = ExitStack()
        self._exit_stack.enter_context(suppress_pillow_warnings)
        self._app = create_app(create_components(settings, None))  # without an access log: Ray logs every request
        self._opening = asyncio.create_task(self._app.repository.open())

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an ASGI request."""
        await self._app(scope, receive, send)

    async def check_health(self) -> None:
        """Check the models. Ray calls this periodically, and replaces a replica after three failures.

        Raises:
            CifarxError: a model cannot be loaded.
            RuntimeError: a model has failed.
        """
        await self._opening
        repository = self._app.repository
        if repository.state == "failed" and not await repository.recheck_failed():
            raise RuntimeError("a model has failed: see the log of the replica")

    async def __del__(self) -> None:
        """Release the models. Ray calls this once all requests are answered."""
        if not hasattr(self, "_app"):  # the constructor has failed
            return
        self._opening.cancel()
        self._app.repository.draining = True
        await self._app.repository.close()
        self._app.metrics.flush()
        self._exit_stack.close()


class Ingress:
    """The ASGI application of the deployment: it forwards requests to the replica of this process."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, with the path relative to the route prefix, and without our X-Request-Id: Ray adds it."""
        if scope["type"] != "http":
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", "")) or "/"

        async def send_without_request_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            await send(message)

        replica = serve.get_replica_context().servable_object
        await replica.handle({**scope, "path": path}, receive, send_without_request_id)


def app(arguments: dict[str, Any]) -> "serve.Application":
    """Build the application, named `cifarx_serve.ray:app` for `serve run` and in configuration files.

    Args:
        arguments: arguments as in `Arguments`; those that are missing are read from the environment.

    Raises:
        UsageError: there is no model file, or an argument is unknown or invalid.
    """
    settings = parse_settings({**_environment_arguments(), **arguments})
    limits = settings.limits
    deployment = serve.deployment(
        name=_NAME,
        # Ray's default of 5 would limit batches to 5 requests. `max_queue` would be too few: the replica must get the
        # requests that it refuses, to refuse them with the errors of the API.
        max_ongoing_requests=limits.max_connections,
        graceful_shutdown_timeout_s=2 * limits.deadline_s,
    )
    return deployment(serve.ingress(Ingress())(Replica)).bind(settings)


def parse_settings(arguments: dict[str, Any]) -> Settings:
    """Return the settings of the replicas. Numbers can be strings.

    Raises:
        UsageError: there is no model file, or an argument is unknown or invalid.
    """
    try:
        parsed = msgspec.convert(arguments, Arguments, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(Arguments.__struct_fields__)
        problem = f"invalid arguments for Ray Serve ({error})"
        raise UsageError(problem, f"use {known}, or variables named {ENV_PREFIX}…") from error
    files = parsed.files.split(os.pathsep) if isinstance(parsed.files, str) else parsed.files
    if not any(files):
        raise UsageError("no file to serve", f"set {ENV_PREFIX}FILES, or pass the argument files")
    return Settings(
        files=absolute_paths(files_by_name([file for file in files if file])),
        backend=parsed.backend,
        device=parsed.device,
        limits=limits_from_options({option.name: getattr(parsed, option.name) for option in _LIMIT_OPTIONS}),
        api_key_file=parsed.api_key_file and absolute_path(Path(parsed.api_key_file)),
    )


def _environment_arguments() -> dict[str, str]:
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in os.environ.items()
        if name.startswith(ENV_PREFIX)
    }
