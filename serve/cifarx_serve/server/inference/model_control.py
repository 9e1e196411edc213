"""Loading and unloading models of a model repository on request, in all workers, as seen by one of them."""

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from cifarx_serve.errors import CifarxError
from cifarx_serve.server.inference.errors import ModelControlError
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.model_changes import Action, ChangeReply, ChangeRequest
from cifarx_serve.server.model_files import parse_key, scan_repository

_MAX_NAME: Final = 255


class IndexEntry(msgspec.Struct, frozen=True):
    """A version of a model of the repository. `reason` says why it is not ready."""

    name: str
    version: str = ""
    state: Literal["READY", "UNAVAILABLE"] = "UNAVAILABLE"
    reason: str = ""


class ModelControl:
    """Loads and unloads models, and lists those that there are.

    Args:
        repository: the models of this worker.
    """

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository
        self._send: Callable[[ChangeRequest], None] | None = None
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[None]] = {}

    def connect(self, send: Callable[[ChangeRequest], None]) -> None:
        """Send requests with a function to the supervisor, whose replies are passed to `on_reply`."""
        self._send = send

    def on_reply(self, reply: ChangeReply) -> None:
        """End the request that a reply belongs to."""
        if (waiting := self._waiting.get(reply.id)) and not waiting.done():
            if reply.error is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(ModelControlError(*reply.error))

    async def change(self, action: Action, model: str) -> None:
        """Load or unload all versions of a model, and return when every worker has done it.

        A model that is loaded already is replaced if its file has changed.

        Raises:
            ModelControlError: the server does not allow it, there is no such model, or a worker could not load it.
        """
        settings = self._repository.settings
        if settings.model_repository is None or self._send is None:
            problem = f"cannot {action} models: the server has no model repository"
            raise ModelControlError(problem, "start it with --model-repository DIR --model-control explicit")
        if settings.model_control != "explicit":
            problem = f"cannot {action} models: the server was started with --model-control {settings.model_control}"
            raise ModelControlError(problem, "start it with --model-control explicit")
        if len(model) > _MAX_NAME:  # a message to the supervisor has a maximum length
            raise ModelControlError(f"unknown model {model[:80]!r}", f"names have at most {_MAX_NAME} characters")
        number = next(self._ids)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(ChangeRequest(number, action, model))
            await waiting
        finally:
            del self._waiting[number]

    async def index(self, only_ready: bool = False) -> list[IndexEntry]:
        """Return the loaded models, and those of the model repository that are not loaded.

        Args:
            only_ready: whether to leave out models that cannot answer requests.

        Raises:
            ModelControlError: the model repository cannot be read.
        """
        instances, directory = self._repository.instances, self._repository.settings.model_repository
        entries = [
            IndexEntry(instance.model.name, instance.model.protocol_version, "READY")
            if not instance.failed
            else IndexEntry(instance.model.name, instance.model.protocol_version, reason="fails on every input")
            for instance in instances
        ]
        if only_ready:
            return [entry for entry in entries if entry.state == "READY"]
        if directory is not None:
            try:
                keys = await asyncio.to_thread(scan_repository, Path(directory))
            except CifarxError as error:
                raise ModelControlError(error.problem, error.remedy) from error
            loaded = {instance.model.key for instance in instances}
            for name, number in (parse_key(key) for key in keys if key not in loaded):
                entries.append(IndexEntry(name, str(number or ""), reason="not loaded"))
        return entries
